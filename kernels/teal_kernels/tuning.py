"""Which cut a product gets: tables of measured configurations, per GPU, shape, dtype and sparsity.

A table is JSON: the device, what measured it, and entries `{inputs, outputs, dtype, rows, epilogue,
sparsity, microseconds, config}`. `teal bench --kernels --tune` writes a user's own, which goes
before the packaged ones. Choosing reads tables only: nothing is timed while a model decodes.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teal_kernels.packing import Packed
from teal_kernels.triton_gemv import TileConfig

_PACKAGED = Path(__file__).with_name("tuning_tables")
TABLE_VERSION = 3


class TuningTableError(RuntimeError):
    """A table is damaged."""


@dataclass(frozen=True)
class Entry:
    """One measured product."""

    inputs: int
    outputs: tuple[int, ...]
    dtype: str
    """Of the weights; int8 or int4 where they are quantised."""
    rows: int
    epilogue: str
    sparsity: float
    """Realised by every row; 0 for a dense read."""
    microseconds: float
    """Of a launch by itself; where skipping did not pay in the model, at least the dense read's, times how much longer
    than a dense token one was that skipped."""
    config: TileConfig

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Entry":
        """Inverse of `asdict`."""
        fields = dict(content)
        fields["outputs"] = tuple(fields["outputs"])
        fields["config"] = TileConfig(**fields["config"])
        return cls(**fields)

    @property
    def product(self) -> tuple[int, tuple[int, ...], str, int, str]:
        """What was measured, whatever the sparsity."""
        return self.inputs, self.outputs, self.dtype, self.rows, self.epilogue

    def distance(self, inputs: int, outputs: tuple[int, ...], bits: int, rows: int, epilogue: str) -> float:
        """How unlike another product is: 0 for the same. Weights of other bits are further than twice the rows."""
        size = abs(math.log2(self.inputs / inputs)) + abs(math.log2(sum(self.outputs) / sum(outputs)))
        unlike = abs(math.log2(_BITS[self.dtype] / bits)) + 4.0 * ((_BITS[self.dtype] < 16) != (bits < 16))
        return size + 10.0 * abs(math.log2(self.rows / rows)) + (epilogue != self.epilogue) + 12.0 * unlike


_BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "int8": 8, "int4": 4}


def kind_of(table: Tensor | Packed) -> str:
    """What a table calls the weights: their dtype, or int8 or int4."""
    return f"int{table.bits}" if isinstance(table, Packed) else str(table.dtype).removeprefix("torch.")


def user_table(device_name: str) -> Path:
    """Where a user's own table of a GPU lies."""
    home = Path(os.environ.get("TEAL_HOME", Path.home() / ".cache" / "teal"))
    return home / "tuning" / f"{device_name.lower().replace(' ', '-')}.json"


def keep_entries(device_name: str, entries: list[Entry], versions: dict[str, str]) -> Path:
    """Add measured entries to the user's own table, in place of those of the same product.

    Returns:
        The table's file.
    """
    path = user_table(device_name)
    held: tuple[Entry, ...] = ()
    if path.is_file():
        with suppress(TuningTableError):  # what cannot be read is replaced
            held = _read(path)
    new = {entry.product for entry in entries}
    content = {
        "version": TABLE_VERSION,
        "device": device_name,
        "versions": versions,
        "entries": [asdict(entry) for entry in (*(e for e in held if e.product not in new), *entries)],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
    partial.replace(path)
    _entries.cache_clear()
    return path


def _read(path: Path) -> tuple[Entry, ...]:
    """A table's entries; none of another version."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != TABLE_VERSION:
            return ()
        return tuple(Entry.from_dict(entry) for entry in content["entries"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TuningTableError(
            f"the tuning table {path} cannot be read ({error!r}): delete it, or tune again"
        ) from error


def has_table(device_name: str) -> bool:
    """Whether anything was measured on this very GPU: by its user, or packaged."""
    own = user_table(device_name)
    return own.is_file() or (_PACKAGED / own.name).is_file()


@lru_cache(maxsize=8)
def _entries(device_name: str) -> tuple[Entry, ...]:
    """The user's entries and those packaged for this GPU; without any, those of another GPU."""
    own = user_table(device_name)
    packaged = _PACKAGED / own.name
    found: tuple[Entry, ...] = ()
    for path in (own, packaged):
        if path.is_file():
            products = {entry.product for entry in found}
            found += tuple(entry for entry in _read(path) if entry.product not in products)
    if not found:
        for path in sorted(_PACKAGED.glob("*.json"))[:1]:
            found = _read(path)
    return found


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
    """
    kind = dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch.")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    shadowed = {entry.product for entry in _tried}
    entries = (*_tried, *(entry for entry in _entries(name) if entry.product not in shadowed))
    nearest = min(
        (entry for entry in entries if entry.config.dense),
        key=lambda e: (e.distance(inputs, parts, _BITS[kind], rows, epilogue), e.dtype != kind),
        default=None,
    )
    # A weight is read if any row of the batch needs it. Rows drop inputs of their own, or more alike.
    if nearest is None:
        return replace(UNTUNED, dense=sparsity**rows < _WORTHWHILE)
    sparsity = sparsity ** (rows / nearest.rows)
    alike = [entry for entry in entries if entry.product == nearest.product]
    dense = min((e for e in alike if e.config.dense), key=lambda e: e.microseconds)
    sparse = sorted((e for e in alike if not e.config.dense), key=lambda e: e.sparsity)
    if sparsity <= 0.0 or not sparse:
        return _rescaled(dense, _BITS[kind])
    longer = 1.0 + _FURTHER_ROW * max(0, rows - nearest.rows)
    if _interpolated(sparse, sparsity) * longer >= dense.microseconds:
        return _rescaled(dense, _BITS[kind])
    return _rescaled(min(sparse, key=lambda e: abs(e.sparsity - sparsity)), _BITS[kind])


def _rescaled(entry: Entry, bits: int) -> TileConfig:
    """The cut of an entry for weights of so many bits: as many bytes of them in a tile."""
    if bits >= 16 or _BITS[entry.dtype] == bits:
        return entry.config
    return replace(entry.config, block_in=max(1, entry.config.block_in * min(16, _BITS[entry.dtype]) // bits))


def _interpolated(entries: list[Entry], sparsity: float) -> float:
    """Microseconds at a sparsity between those measured; at the ends, along the last line."""
    if len(entries) == 1:
        return entries[0].microseconds
    above = next((i for i, entry in enumerate(entries) if entry.sparsity >= sparsity), len(entries) - 1)
    low, high = entries[max(above, 1) - 1], entries[max(above, 1)]
    slope = (high.microseconds - low.microseconds) / (high.sparsity - low.sparsity)
    return low.microseconds + slope * (sparsity - low.sparsity)
