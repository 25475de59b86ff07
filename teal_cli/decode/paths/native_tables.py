"""Weights, norms and rules of a product as the native library takes them, and whether they are what they were."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from teal_cli.decode.blocks import Norm
from teal_cli.sparse import SparseLinear
from teal_kernels.packing import Packed


def joined_norms(norms: Sequence[Norm], *, bias: bool = False) -> Tensor:
    """Weights or biases of norms of heads: (dim,) of one for all heads, (heads * dim,) of each head's own."""
    tables = [norm.bias if bias else norm.weight for norm in norms]
    joined = torch.cat([table.detach().float().flatten() for table in tables if table is not None])
    return joined if bias else joined + float(norms[0].plus_one)


def is_gapless(table: Tensor | Packed) -> bool:
    """Whether the outputs of a table lie side by side: codes begin a word in each projection."""
    return isinstance(table, Tensor) or all(part * table.bits % 32 == 0 for part in table.parts[:-1])


def weights_of(layers: tuple[nn.Linear, ...]) -> Tensor | Packed:
    """(outputs of all layers, inputs), or codes."""
    first = layers[0]
    if not isinstance(first, SparseLinear):
        return first.weight.detach()
    table = first.merged.table if len(layers) > 1 else first.packed
    if isinstance(table, Packed):
        return replace(table, parts=(sum(table.parts),))
    # Detached, it holds the memory itself, and not the parameter, which may be given other memory.
    return first.weight.detach() if table is None else table.t()


class Sources:
    """What a program was made of.

    Args:
        model: whose weights are read where they lie.
        copied: those of its tensors of which there are copies.
    """

    def __init__(self, model: nn.Module, copied: Iterable[Tensor]) -> None:
        self._copied = [tensor for tensor in copied if not tensor.is_inference()]
        self._held = [(module._parameters, name) for module in model.modules() for name in module._parameters]
        self._written, self._addresses = self._writes(), self._where()

    @property
    def is_overwritten(self) -> bool:
        """Whether something was written in place to what there are copies of, and torch has counted it."""
        return self._writes() != self._written

    @property
    def is_current(self) -> bool:
        """Whether nothing was, and the parameters that the model has now lie where they did."""
        return not self.is_overwritten and self._where() == self._addresses

    def _writes(self) -> int:
        """So far: 3 us for the norms of 30 layers, 7 us with biases of q, k and v."""
        return sum([tensor._version for tensor in self._copied])

    def _where(self) -> list[int | None]:
        parameters = (of_module[name] for of_module, name in self._held)
        return [None if parameter is None else parameter.data_ptr() for parameter in parameters]
