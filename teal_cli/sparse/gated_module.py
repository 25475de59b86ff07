"""What takes the place of a gated MLP, with the same layers under the same names."""

from typing import cast

from torch import nn

from teal_cli.checkpoint.rules import Rule
from teal_cli.sparse.control import SparsityControl


class GatedModule(nn.Module):
    """Has the children of an MLP that is down(activation(gate(x)) * up(x)).

    Args:
        mlp: the module to replace.
        names: of its gate, up and down layers among its children.
        rule: how neurons are left out.
        path: of the module in the model, for counting.
        control: the model's.
    """

    def __init__(
        self, mlp: nn.Module, names: tuple[str, str, str], rule: Rule, *, path: str, control: SparsityControl
    ) -> None:
        super().__init__()
        for name, child in mlp.named_children():  # keys of the state dict stay what they are
            self.add_module(name, child)
        self.train(mlp.training)
        self.names = names
        self.path = path
        self.control = control
        self.rule = rule

    @property
    def layers(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        """gate, up and down."""
        gate, up, down = (cast(nn.Linear, getattr(self, name)) for name in self.names)
        return gate, up, down
