"""The routed MLP: a router chooses groups of neurons, and of the others neither gate, up nor down is read.

LTE (arXiv 2402.06126) trains such routers, with groups of 32 neurons; the predictors of PowerInfer (arXiv 2312.12456)
are routers of two layers with groups of one. What is left out is zero whatever its gate would be, so prompts are routed
too: without its routers a model is another function.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, relu

from teal_cli.checkpoint.rules import Routed
from teal_cli.sparse.context import PassContext, decide
from teal_cli.sparse.control import SparsityControl
from teal_cli.sparse.counting import SparsityCounter
from teal_cli.sparse.gated_module import GatedModule
from teal_kernels import resolve_backend
from teal_kernels.gate_first import gathered_products


class Router(nn.Module):
    """Gives each group of neurons a logit, from what the MLP reads.

    The weights are in the model's dtype, logits are sums in float32. Rounding keeps their sign, so all paths choose
    alike, but for a sum that is on the other side of zero when it is taken in another order.

    Args:
        inputs: of the MLP.
        groups: of its neurons.
        rank: of a first layer with ReLU behind it; None for one linear layer.
        where: device and dtype.
    """

    teal_aside: ClassVar[bool] = True
    """Its weights are none that a block program must name."""
    first: nn.Parameter | None
    """(rank, inputs)"""

    def __init__(self, inputs: int, groups: int, rank: int | None = None, **where: Any) -> None:
        super().__init__()
        self.register_parameter("first", None if rank is None else nn.Parameter(torch.empty(rank, inputs, **where)))
        self.weight = nn.Parameter(torch.empty(groups, inputs if rank is None else rank, **where))
        self.bias = nn.Parameter(torch.empty(groups, **where))

    @property
    def parameters_read(self) -> int:
        """Weights that every token reads."""
        return self.weight.numel() + (0 if self.first is None else self.first.numel())

    def extra_repr(self) -> str:
        """For `print(model)`."""
        inputs = self.weight.shape[1] if self.first is None else self.first.shape[1]
        rank = None if self.first is None else self.first.shape[0]
        return f"inputs={inputs}, groups={self.weight.shape[0]}, rank={rank}"

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., groups)"""
        return linear(x if self.first is None else relu(linear(x, self.first)), self.weight, self.bias)


def chosen_by(logits: Tensor) -> Tensor:
    """Which groups are chosen, bool: those whose sigmoid is above 1/2. A NaN chooses, since it must show."""
    return (logits <= 0).logical_not_()


class RoutedMLP(GatedModule):
    """Takes the place of down(activation(gate(x)) * up(x)), with the same layers under the same names, and a router.

    Every pass is routed, a dense one too. While one token a row is decoded, only what is chosen is read: of gate and
    up rows, of down columns, since the other neurons are exactly zero and the rule of down skips zeros. A pass that is
    dense or masked computes all neurons and sets those to zero: the same function.

    Args:
        mlp: the module to replace.
        names: of its gate, up and down layers among its children.
        activation: of the activation among its children.
        rule: group size and rank of the router.
        path: of the module in the model, for counting.
        control: the model's.

    Raises:
        ValueError: neurons that are no whole number of groups.
    """

    def __init__(
        self,
        mlp: nn.Module,
        names: tuple[str, str, str],
        activation: str,
        rule: Routed,
        *,
        path: str,
        control: SparsityControl,
    ) -> None:
        super().__init__(mlp, names, rule, path=path, control=control)
        self.activation = activation
        self.activates_up: bool = getattr(mlp, "activates_up", False)
        self.group = rule.group
        self.soft = False
        """Whether neurons are multiplied by the sigmoid of their group's logit, all of them: the first stage of LTE."""
        weight = self.layers[0].weight
        groups, rest = divmod(weight.shape[0], rule.group)
        if rest:
            raise ValueError(f"{weight.shape[0]} neurons of {path} are no whole number of groups of {rule.group}")
        self.router = Router(weight.shape[1], groups, rule.rank, device=weight.device, dtype=weight.dtype)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"rule={self.rule}, soft={self.soft}"

    def forward(self, x: Tensor) -> Tensor:
        """(..., tokens, in) -> (..., tokens, in)"""
        gate, up, down = self.layers
        control = self.control
        context = control.context or control.context_alone(x)
        out: Tensor
        if self.soft:
            with torch.autocast(x.device.type, enabled=False):
                share = torch.sigmoid(self.router(x.float()).float())
            hidden = self.hidden(gate(x), up(x))
            out = down(hidden * self._of_neurons(share).to(hidden.dtype))
            return out
        chosen = chosen_by(self.router(x))
        decision = decide(self.rule, context, x.numel() // x.shape[-1])
        if context.counter is not None and decision != "dense":
            self._count(context.counter, chosen, context)
        on_cpu = resolve_backend(control.backend, x.device, x.dtype) == "cpu" and not torch.compiler.is_compiling()
        if decision == "skip" and on_cpu:
            out = down(self._of_chosen(x, chosen))
        else:
            hidden = self.hidden(gate(x), up(x))
            out = down(torch.where(self._of_neurons(chosen), hidden, torch.zeros_like(hidden)))
        return out

    def hidden(self, gate: Tensor, up: Tensor) -> Tensor:
        """What down reads, before groups are left out: the activated gate times up, as the dense model has it."""
        activation = getattr(self, self.activation)
        product: Tensor = activation(gate) * (activation(up) if self.activates_up else up)
        return product

    def _of_neurons(self, of_groups: Tensor) -> Tensor:
        """(..., groups) -> (..., neurons)"""
        return of_groups.repeat_interleave(self.group, dim=-1) if self.group > 1 else of_groups

    def _of_chosen(self, x: Tensor, chosen: Tensor) -> Tensor:
        """(..., in), (..., groups) -> (..., neurons): reads rows of groups that any token chose."""
        gate, up, _ = self.layers
        inputs, live = x.reshape(-1, x.shape[-1]), self._of_neurons(chosen).reshape(-1, gate.out_features)
        index = live.any(0).nonzero().view(-1)
        hidden = inputs.new_zeros(live.shape)
        if index.shape[0]:
            parts = []
            for layer in (gate, up):
                part = gathered_products(inputs, layer.weight, index)
                parts.append(part if layer.bias is None else part + layer.bias.index_select(0, index))
            product = self.hidden(*parts)
            hidden.index_copy_(1, index, torch.where(live.index_select(1, index), product, product.new_zeros(())))
        return hidden.view(*x.shape[:-1], gate.out_features)

    def _count(self, counter: SparsityCounter, chosen: Tensor, context: PassContext) -> None:
        """Count neurons of groups that were left out as what gate and up drop: outputs, not inputs."""
        groups = chosen.shape[-1]
        tokens = chosen.shape[-2] if chosen.dim() > 1 else 1
        rows = context.rows_that_drop(chosen.numel() // groups, tokens, 0, chosen.device)
        stays = context.stays_dense(tokens, 0, chosen.device)
        kept = chosen if stays is None else chosen | stays
        dropped = (kept.numel() - kept.count_nonzero()) * self.group
        for name, layer in zip(self.names[:2], self.layers, strict=False):
            counter.add(f"{self.path}.{name}", layer.weight.numel(), rows * groups * self.group, dropped)
