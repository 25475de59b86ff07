"""An MLP that decodes gate first, as a session of the fused path runs it: gate, live rows of up and activation."""

import torch
from torch import Tensor

from teal_cli.decode.blocks import Product
from teal_cli.decode.paths.program_session import Counted
from teal_cli.sparse.gate_first import GateFirstMLP
from teal_kernels.gate_first import rounded_threshold
from teal_kernels.operands import Norm
from teal_kernels.triton_gate_first import GateLayer, launch_gate_first, step_config


class GateFirstLaunch:
    """Its first two products in one launch. The third is a product of its own, whose zeros are skipped.

    Args:
        mlp: whose gate and up lie row by row (`cannot_launch`).
        enabled: False computes every neuron.
        rows: of the batch.
        dtype: of the hidden states.
    """

    def __init__(self, mlp: GateFirstMLP, enabled: bool, rows: int, dtype: torch.dtype) -> None:
        self.mlp, self.enabled = mlp, enabled
        gate, up, _ = mlp.layers
        self._gate = GateLayer(gate.weight.detach(), None if gate.bias is None else gate.bias.detach())
        self._up, self._bias = up.weight.detach(), None if up.bias is None else up.bias.detach()
        self._threshold = rounded_threshold(mlp.activation.threshold, dtype)
        self.config = step_config(gate.in_features, rows)
        self.kept = torch.zeros(1, dtype=torch.int64, device=up.weight.device)
        """Live neurons of every row."""

    def run(self, x: Tensor, y: Tensor, pdl: bool, norm: Norm | None = None) -> None:
        """Launch it: (rows, in) -> (rows, neurons), what down reads."""
        launch_gate_first(
            x,
            self._gate,
            self._up,
            self._bias,
            y,
            kind=self.mlp.activation.kind,
            threshold=self._threshold,
            norm=norm,
            dense=not self.enabled,
            counts=self.kept,
            config=self.config,
            pdl=pdl,
        )

    def counted(self) -> list[Counted]:
        """Gate and up, of which the neurons that are dead count as dropped: outputs, not inputs."""
        names = (f"{self.mlp.path}.{name}" for name in self.mlp.names[:2])
        layers = zip(names, self.mlp.layers[:2], (None, 0), strict=True)
        return [
            Counted(name, layer.in_features * layer.out_features, layer.out_features, counter)
            for name, layer, counter in layers
        ]


def cannot_launch(product: Product) -> str | None:
    """Why an MLP that decodes gate first cannot be launched; None where it can, or it does not."""
    mlp = product.gate_first
    if mlp is None or all(layer.weight.stride(1) == 1 for layer in mlp.layers[:2]):
        return None
    return f"gate and up of {mlp.path} that do not lie row by row"
