"""The gated MLP that decodes gate first: rows of `up` and columns of `down` only for neurons that live."""

from torch import Tensor, nn

from teal_cli.checkpoint.rules import Zeros
from teal_cli.sparse.context import PassContext, decide
from teal_cli.sparse.control import SparsityControl
from teal_cli.sparse.counting import SparsityCounter
from teal_cli.sparse.gated_module import GatedModule
from teal_kernels import resolve_backend
from teal_kernels.gate_first import GateActivation, gate_first, gated_hidden


class GateFirstMLP(GatedModule):
    """Takes the place of down(activation(gate(x)) * up(x)), with the same layers under the same names.

    While one token a row is decoded, the gate product decides which neurons live, and `up` is
    computed for these alone; `down` is a `SparseLinear` whose rule is `Zeros`. A
    prefill is dense, with the bits of the dense MLP. Nothing waits for the device.

    Args:
        mlp: the module to replace.
        names: of its gate, up and down layers among its children.
        activation: how the gate decides.
        path: of the module in the model, for counting.
        control: the model's.
    """

    def __init__(
        self,
        mlp: nn.Module,
        names: tuple[str, str, str],
        activation: GateActivation,
        *,
        path: str,
        control: SparsityControl,
    ) -> None:
        super().__init__(mlp, names, Zeros(), path=path, control=control)
        self.activation = activation

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"gate first, {self.activation}"

    def forward(self, x: Tensor) -> Tensor:
        """(..., tokens, in) -> (..., tokens, in); what is skipped `decide` says."""
        gate_layer, up_layer, down_layer = self.layers
        control = self.control
        context = control.context or control.context_alone(x)
        decision = decide(self.rule, context, x.numel() // x.shape[-1])
        counter = None if decision == "dense" else context.counter
        # A GPU computes the gates in the launch that needs them.
        fused = decision == "skip" and resolve_backend(control.backend, x.device, x.dtype) == "triton"
        if not fused or counter is not None:
            gate = gate_layer(x)
        if counter is not None:
            self._count(counter, gate, context)
        up, activation = up_layer.weight, self.activation
        if fused:
            hidden = gated_hidden(x, gate_layer.weight, gate_layer.bias, up, up_layer.bias, activation, "triton")
        elif decision != "skip":  # zeros are zeros, whoever computes them
            hidden = activation.hidden(gate, up_layer(x))
        else:
            hidden = gate_first(x, gate, up, up_layer.bias, activation, control.backend)
        out: Tensor = down_layer(hidden)
        return out

    def _count(self, counter: SparsityCounter, gate: Tensor, context: PassContext) -> None:
        """Count dead neurons as what `up` drops: its outputs, not its inputs. The gate drops nothing."""
        gate_layer, up_layer, _ = self.layers
        tokens = gate.shape[-2] if gate.dim() > 1 else 1
        seen = context.rows_that_drop(gate.numel() // gate.shape[-1], tokens, 0, gate.device) * gate.shape[-1]
        live, stays = self.activation.live(gate), context.stays_dense(tokens, 0, gate.device)
        if stays is not None:
            live = live | stays
        gate_name, up_name = (f"{self.path}.{name}" for name in self.names[:2])
        counter.add(gate_name, gate_layer.weight.numel(), seen, 0)
        counter.add(up_name, up_layer.weight.numel(), seen, live.numel() - live.count_nonzero())
