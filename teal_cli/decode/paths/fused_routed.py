"""A routed MLP, as a session of the fused path runs it: router, then gate and up of the groups that it chose."""

import torch
from torch import Tensor

from teal_cli.decode.activations import activation_of
from teal_cli.decode.blocks import Product
from teal_cli.decode.paths.program_session import Counted
from teal_cli.sparse.routed import RoutedMLP
from teal_kernels.gate_first import rounded_threshold
from teal_kernels.operands import Norm
from teal_kernels.triton_gate_first import GateLayer
from teal_kernels.triton_routed import GroupRouter, launch_routed, no_choice, route_groups, routed_config


class RoutedLaunch:
    """Router, gate and up, in two launches, or three. Down is a product of its own, whose zeros are skipped.

    Args:
        product: gate and up of a routed MLP, row by row (`cannot_launch`).
        mlp: that one.
        enabled: False computes every neuron; what is left out is zero all the same.
        rows: of the batch.
        dtype: of the hidden states.
    """

    def __init__(self, product: Product, mlp: RoutedMLP, enabled: bool, rows: int, dtype: torch.dtype) -> None:
        self.mlp, self.enabled = mlp, enabled
        gate, up, _ = mlp.layers
        biases = (None if layer.bias is None else layer.bias.detach() for layer in (gate, up))
        self._gate, self._up = map(GateLayer, (gate.weight.detach(), up.weight.detach()), biases)
        first, router = mlp.router.first, mlp.router
        self._router = GroupRouter(
            None if first is None else first.detach(), router.weight.detach(), router.bias.detach(), mlp.group
        )
        kind, threshold = activation_of(product)
        self._kind, self._threshold = str(kind), rounded_threshold(threshold, dtype)
        self.config = routed_config(gate.in_features, rows, mlp.group)
        self._chosen, self._ranked = no_choice(rows, self._router, gate.weight.device, dtype)
        self.kept = torch.zeros(1, dtype=torch.int64, device=gate.weight.device)
        """Neurons that rows chose."""

    def run(self, x: Tensor, y: Tensor, pdl: bool, norm: Norm | None = None) -> None:
        """Launch it: (rows, in) -> (rows, neurons), what down reads."""
        route_groups(x, self._router, self._chosen, self._ranked, norm=norm, counts=self.kept, pdl=pdl)
        launch_routed(
            x,
            self._chosen,
            self._gate,
            self._up,
            y,
            group=self.mlp.group,
            kind=self._kind,
            threshold=self._threshold,
            norm=norm,
            whole=not self.enabled,
            config=self.config,
            pdl=pdl,
        )

    def counted(self) -> list[Counted]:
        """Gate and up, of which the neurons that were left out count as dropped: outputs, not inputs."""
        return [
            Counted(f"{self.mlp.path}.{name}", layer.in_features * layer.out_features, layer.out_features, 0)
            for name, layer in zip(self.mlp.names[:2], self.mlp.layers[:2], strict=True)
        ]


def cannot_launch(product: Product) -> str | None:
    """Why a routed MLP cannot be launched; None where it can, or it is none."""
    mlp = product.routed
    if mlp is None or all(layer.weight.stride(1) == 1 for layer in mlp.layers[:2]):
        return None
    return f"gate and up of {mlp.path} that do not lie row by row"
