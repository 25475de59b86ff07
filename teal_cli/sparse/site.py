"""The projections that read one hidden state, with their weights side by side.

q, k and v (and gate and up) drop the same inputs when their thresholds agree. Their weights then
form one input-major table, and one sparse product serves them all: one list of active inputs, one
pass over memory. Each layer's `weight` is a view of the table, so the weights are held once.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from teal_kernels import input_major, sparse_linear

if TYPE_CHECKING:
    from teal_cli.sparse.linear import SparseLinear


class Site:
    """A hidden state and the sparse layers that read it.

    The first layer called with a hidden state computes the product of all; the others take their
    part of it. The hidden state is recognised by identity and version, and each weight by its
    address: a layer called with anything else, or whose weight was moved or replaced, computes for
    itself.
    """

    def __init__(self) -> None:
        self.layers: list[SparseLinear] = []
        self._table: Tensor | None = None  # (in, total out)
        self._bias: Tensor | None = None  # (total out,)
        self._parts: list[tuple[int, int]] = []
        self._addresses: list[int] = []
        self._agree = False
        self._x: Tensor | None = None
        self._version = -1
        self._y: Tensor | None = None

    def add(self, layer: "SparseLinear") -> int:
        """Take in a layer; its number at this site."""
        self.layers.append(layer)
        return len(self.layers) - 1

    @torch.no_grad()
    def lay_out_(self) -> None:
        """Put the layers' weights side by side, input-major. Idempotent."""
        if self._table is not None:
            return
        weights = [layer.weight for layer in self.layers]
        alike = len({(w.shape[1], w.dtype, w.device) for w in weights}) == 1
        has_bias = {layer.bias is not None for layer in self.layers}
        if len(weights) == 1 or not alike or len(has_bias) != 1:
            for weight in weights:
                weight.data = input_major(weight.data)
            return
        table = torch.cat([weight.t() for weight in weights], dim=1)
        stops = torch.tensor([weight.shape[0] for weight in weights]).cumsum(0).tolist()
        self._parts = list(zip([0, *stops[:-1]], stops, strict=True))
        for weight, (start, stop) in zip(weights, self._parts, strict=True):
            weight.data = table[:, start:stop].t()
        self._table = table
        self._addresses = [weight.data_ptr() for weight in weights]
        self._bias = torch.cat([layer.bias for layer in self.layers]) if has_bias == {True} else None
        self.thresholds_changed()

    def forget_layout(self) -> None:
        """The weights were moved or cast and are no longer views of the table: drop it."""
        self._table = self._bias = None
        self._forget_product()

    def thresholds_changed(self) -> None:
        """Look again whether the layers drop the same inputs."""
        self._agree = self._table is not None and len({layer.plan for layer in self.layers}) == 1
        self._forget_product()

    def __getstate__(self) -> dict[str, object]:
        """Copies and pickles carry no table: their weights are tensors of their own."""
        return self.__dict__ | {"_table": None, "_bias": None, "_x": None, "_y": None}

    def _forget_product(self) -> None:
        self._x = self._y = None

    def product(self, number: int, x: Tensor, backend: str) -> Tensor:
        """The sparse product of one layer: (..., in) -> (..., out)."""
        layer = self.layers[number]
        table = self._table
        # Compiled code and inference tensors cannot tell whether x is the same as before.
        if (
            table is None
            or not self._agree
            or torch.compiler.is_compiling()
            or x.is_inference()
            or layer.weight.data_ptr() != self._addresses[number]
        ):
            return sparse_linear(x, layer.weight, layer.bias, layer.threshold, backend)
        if self._y is None or x is not self._x or x._version != self._version:
            self._y = sparse_linear(x, table.t(), self._bias, layer.threshold, backend)
            self._x, self._version = x, x._version
        start, stop = self._parts[number]
        y = self._y[..., start:stop]
        if number == len(self.layers) - 1:  # the last to read it
            self._forget_product()
        return y
