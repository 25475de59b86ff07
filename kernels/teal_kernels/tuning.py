"""Which tile config a product gets: that of the nearest measured product of a tuning table.

`choose_config` reads tables only: nothing is timed while a model decodes. `teal bench --kernels --tune` measures.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch

from teal_kernels.plan_gemv import TileConfig
from teal_kernels.tuning_entries import BITS, Entry
from teal_kernels.tuning_files import table_of

_tried: tuple[Entry, ...] = ()


@contextmanager
def trying(entries: Iterable[Entry]) -> Iterator[None]:
    """For a while, choose from these entries for the products that they measured."""
    global _tried
    before, _tried = _tried, tuple(entries)
    try:
        yield
    finally:
        _tried = before


UNTUNED = TileConfig(block_out=128, block_in=4, unroll=4, inputs_per_chunk=256, warps=1)
"""What any product can run with."""
_WORTHWHILE = 0.2
"""Without a table: the sparsity from which skipping is taken to pay."""
_LISTING_ALL = 1.04
"""What a product that skips takes of a dense read at sparsity 0, where it lists all inputs: the median of 24 products
of one row (H100: 0.94 to 1.24, by the line through 25 and 50 %)."""
_FURTHER_ROW = 0.08
"""What a row that was not measured adds to a product that skips, whose programs list its inputs too. A block of
Llama-3-8B with eight rows took 4 % a row longer than with four that left about as much unread (gate+up 5 %, down 7 %),
in int8 9 % (H100)."""


def choose_config(
    device: torch.device,
    *,
    inputs: int,
    parts: tuple[int, ...],
    dtype: torch.dtype | str,
    rows: int,
    epilogue: str,
    sparsity: float,
) -> TileConfig:
    """How to run a product: from the nearest measured one, sparse only where that was faster than dense.

    Args:
        device: where it runs.
        inputs: of the product.
        parts: outputs of each projection.
        dtype: of the weights, or int8 or int4.
        rows: of the batch. Between batches that were measured, what they do not read counts.
        epilogue: what follows the product, as `gemv` takes it.
        sparsity: expected of each row, weighted by outputs; 0 where everything is read.

    Raises:
        TuningTableError: a table of this GPU is damaged.
    """
    kind = dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch.")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    packaged = table_of(name)
    if _tried:
        shadowed = {entry.product for entry in _tried}
        entries = (*_tried, *(entry for entry in packaged if entry.product not in shadowed))
        found = _measured(entries, inputs, parts, kind, rows, epilogue)
    else:
        found = _remembered(_Table(packaged), inputs, parts, kind, rows, epilogue)
    # A weight is read if any row of the batch needs it. Rows drop inputs of their own, or more alike.
    if found is None:
        return replace(UNTUNED, dense=sparsity**rows < _WORTHWHILE)
    dense, sparse = found
    sparsity = sparsity ** (rows / dense.rows)
    if sparsity <= 0.0 or not sparse:
        return _rescaled(dense, BITS[kind])
    longer = 1.0 + _FURTHER_ROW * max(0, rows - dense.rows)
    measured = [(entry.sparsity, entry.cost) for entry in sparse]
    if len(measured) == 1:
        measured.insert(0, (0.0, _LISTING_ALL * dense.cost))
    if _interpolated(measured, sparsity) * longer >= dense.cost:
        return _rescaled(dense, BITS[kind])
    return _rescaled(min(sparse, key=lambda e: abs(e.sparsity - sparsity)), BITS[kind])


class _Measured(NamedTuple):
    """The product of a table that is nearest to another one."""

    dense: Entry
    """Its fastest dense read."""
    sparse: list[Entry]
    """By sparsity."""


def _measured(
    entries: tuple[Entry, ...], inputs: int, parts: tuple[int, ...], kind: str, rows: int, epilogue: str
) -> _Measured | None:
    nearest = min(
        (entry for entry in entries if entry.config.dense),
        key=lambda e: (e.distance(inputs, parts, BITS[kind], rows, epilogue), e.dtype != kind),
        default=None,
    )
    if nearest is None:
        return None
    alike = [entry for entry in entries if entry.product == nearest.product]
    dense = min((e for e in alike if e.config.dense), key=lambda e: e.cost)
    return _Measured(dense, sorted((e for e in alike if not e.config.dense), key=lambda e: e.sparsity))


class _Table:
    """Entries as a key: this very table, since to compare all that it holds would take as long as the search."""

    def __init__(self, entries: tuple[Entry, ...]) -> None:
        self.entries = entries

    def __hash__(self) -> int:
        return id(self.entries)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Table) and self.entries is other.entries


@lru_cache(maxsize=256)
def _remembered(
    table: _Table, inputs: int, parts: tuple[int, ...], kind: str, rows: int, epilogue: str
) -> _Measured | None:
    """A model asks for each product of each block, whenever a session is opened: it took 40 ms of a first token."""
    return _measured(table.entries, inputs, parts, kind, rows, epilogue)


def _rescaled(entry: Entry, bits: int) -> TileConfig:
    """The tile config of an entry for weights of so many bits: as many bytes of them in a tile."""
    if bits >= 16 or BITS[entry.dtype] == bits:
        return entry.config
    return replace(entry.config, block_in=max(1, entry.config.block_in * min(16, BITS[entry.dtype]) // bits))


def _interpolated(measured: list[tuple[float, float]], sparsity: float) -> float:
    """Microseconds at a sparsity, of those measured as (sparsity, microseconds); beyond the ends, by the last line."""
    above = next((i for i, (at, _) in enumerate(measured) if at >= sparsity), len(measured) - 1)
    (low, fewer), (high, more) = measured[max(above, 1) - 1], measured[max(above, 1)]
    return fewer + (more - fewer) / (high - low) * (sparsity - low)
