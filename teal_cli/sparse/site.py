"""The projections that read one hidden state, with their weights side by side.

q, k and v (and gate and up) drop the same inputs when their thresholds agree. Their weights then
form one input-major table, and one sparse product serves them all: one list of active inputs, one
pass over memory. Each layer's `weight` is a view of the table, so the weights are held once. On
SmolLM2-135M at 50 % this took decoding from 1.20 to 1.39 times dense (two Zen cores, float32).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from teal_kernels import input_major, is_input_major, resolve_backend, sparse_linear
from teal_kernels.packed_linear import byte_table, cpu_packed_linear, reference_packed_linear, triton_packed_linear
from teal_kernels.packing import Packed, side_by_side
from teal_kernels.tuning import UNTUNED

if TYPE_CHECKING:
    from teal_cli.sparse.linear import SparseLinear


_ALL = -1


class Site:
    """A hidden state and the sparse layers that read it.

    The first layer called with a hidden state computes the product of all; the others take their
    part of it. The hidden state is recognised by identity and version, and each weight by its
    address: a layer called with anything else, or whose weight was moved or replaced, computes for
    itself. One model is for one thread.
    """

    def __init__(self) -> None:
        self.layers: list[SparseLinear] = []
        self._table: Tensor | None = None  # (in, total out)
        self._packed: Packed | None = None  # in its place, of quantised weights
        self._bytes: dict[int, Tensor] = {}  # what the CPU reads of them, by layer
        self._alike = False  # the plans agree: one product serves all layers
        self._parts: list[tuple[int, int]] = []
        self._addresses: list[int] = []
        self._x: Tensor | None = None
        self._state: tuple[int, bool] | None = None  # version of x, whether inputs were dropped
        self._y: Tensor | None = None

    def add(self, layer: "SparseLinear") -> int:
        """Take in a layer; its number at this site."""
        self.layers.append(layer)
        return len(self.layers) - 1

    @property
    def side_by_side(self) -> bool:
        """Whether `table` holds the weights of all layers."""
        if self.is_quantised:
            return self._packed is not None
        return self._table is not None or (len(self.layers) == 1 and is_input_major(self.layers[0].weight))

    @property
    def is_quantised(self) -> bool:
        """Whether the layers hold codes, all of them."""
        return all(layer.packed is not None for layer in self.layers)

    @property
    def table(self) -> Tensor | Packed:
        """(in, outputs of all layers): the weights, where `side_by_side`."""
        if self._packed is not None:
            return self._packed
        return self.layers[0].weight.t() if self._table is None else self._table

    @torch.no_grad()
    def lay_out_(self) -> None:
        """Lay the weights out for the layers' plans: side by side where one kernel can use that, else each alone.

        A GPU kernel takes a threshold a layer; on the CPU the plans must agree. Cheap where nothing
        has to move.
        """
        self._forget_product()
        if self.is_quantised:
            self._lay_out_packed_()
            return
        if all(layer.stays_as_it_is for layer in self.layers):
            return
        weights = [layer.weight for layer in self.layers]
        self._alike = len({layer.rule for layer in self.layers}) == 1
        one_table = len({(w.shape[1], w.dtype, w.device) for w in weights}) == 1
        if len(weights) == 1 or not one_table or not (self._alike or weights[0].is_cuda):
            self._table = None
            for weight in weights:
                weight.data = input_major(weight.data)
        elif self._table is None:
            table = torch.cat([weight.t() for weight in weights], dim=1)
            stops = torch.tensor([weight.shape[0] for weight in weights]).cumsum(0).tolist()
            self._parts = list(zip([0, *stops[:-1]], stops, strict=True))
            for weight, (start, stop) in zip(weights, self._parts, strict=True):
                weight.data = table[:, start:stop].t()
            self._table = table
            self._addresses = [weight.data_ptr() for weight in weights]

    def _lay_out_packed_(self) -> None:
        """One table of codes; each layer holds its part of it."""
        self._bytes.clear()
        self._alike = len({layer.rule for layer in self.layers}) == 1
        if self._packed is not None:
            return
        table = side_by_side([layer.packed for layer in self.layers if layer.packed is not None])
        word = out = 0
        for layer in self.layers:
            words, outs = layer.storage.shape[1], layer.out_features
            zeros = None if table.zeros is None else table.zeros[:, out : out + outs]
            layer.hold_(table.words[:, word : word + words], table.scales[:, out : out + outs], zeros)
            word, out = word + words, out + outs
        stops = torch.tensor(table.parts).cumsum(0).tolist()
        self._parts = list(zip([0, *stops[:-1]], stops, strict=True))
        self._packed = table

    def forget_layout(self) -> None:
        """The weights were moved or cast and are no longer views of the table: drop it."""
        self._table = self._packed = None
        self._bytes.clear()
        self._forget_product()

    def __getstate__(self) -> dict[str, object]:
        """Copies and pickles carry no table: their weights are tensors of their own."""
        return self.__dict__ | {"_table": None, "_packed": None, "_bytes": {}, "_x": None, "_y": None}

    def _forget_product(self) -> None:
        self._x = self._y = None

    def product(self, number: int, x: Tensor, backend: str) -> Tensor:
        """The sparse product of one layer: (..., in) -> (..., out)."""
        layer, table = self.layers[number], self._table
        if self.is_quantised:
            return self.packed_product(number, x, backend, layer.threshold)
        if table is None or not self._alike:
            return sparse_linear(x, layer.weight, layer.bias, layer.threshold, backend)
        # Compiled code knows no addresses.
        if not torch.compiler.is_compiling() and layer.weight.data_ptr() != self._addresses[number]:
            return sparse_linear(x, layer.weight, layer.bias, layer.threshold, backend)

        def of_all() -> Tensor:
            return sparse_linear(x, table.t(), None, layer.threshold, backend)

        return self._part(number, self._shared(number, x, True, of_all) if _tells_changes(x) else of_all())

    def packed_product(self, number: int, x: Tensor, backend: str, threshold: Tensor) -> Tensor:
        """Of quantised weights: on the CPU one product for all layers where the plans agree."""
        layer, table = self.layers[number], self._packed
        name = resolve_backend(backend, x.device, x.dtype)
        packed = layer.packed
        if packed is None:
            raise TypeError(f"{layer.name} is not quantised")
        if name == "reference":
            return reference_packed_linear(x, packed, layer.bias, threshold)
        if name == "triton":
            # The fused path chooses cuts; here each layer is by itself.
            return triton_packed_linear(x, packed, layer.bias, threshold, replace(UNTUNED, block_in=8))
        if table is None or not self._alike or not _tells_changes(x):
            return cpu_packed_linear(x, self._byte_table(number, packed), packed, layer.bias, threshold)

        def of_all() -> Tensor:
            return cpu_packed_linear(x, self._byte_table(_ALL, table), table, None, threshold)

        return self._part(number, self._shared(number, x, threshold is layer.threshold, of_all))

    def _byte_table(self, number: int, packed: Packed) -> Tensor:
        if number not in self._bytes:
            self._bytes[number] = byte_table(packed)
        return self._bytes[number]

    def _shared(self, number: int, x: Tensor, drops: bool, of_all: Callable[[], Tensor]) -> Tensor:
        """The product of all layers, kept until the last of them has read it.

        Args:
            number: of the layer that reads it.
            x: what it is of.
            drops: whether inputs are dropped.
            of_all: makes it.
        """
        y, state = self._y, (x._version, drops)
        if y is None or x is not self._x or state != self._state:
            y = of_all()
            self._x, self._state, self._y = x, state, y
        if number == len(self.layers) - 1:
            self._forget_product()
        return y

    def _part(self, number: int, y: Tensor) -> Tensor:
        """One layer's part of the product of all, with its bias."""
        start, stop = self._parts[number]
        part, bias = y[..., start:stop], self.layers[number].bias
        return part if bias is None else part + bias


def _tells_changes(x: Tensor) -> bool:
    """Whether a hidden state can tell that it changed since the last call; where it cannot, no product is kept."""
    return not (torch.compiler.is_compiling() or x.is_inference())
