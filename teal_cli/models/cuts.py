"""Cuts of layers: which outputs or inputs one rank holds, and how many are divided. Maths of sizes, without a model."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

Span = tuple[int, int]
"""From the first on, up to the second, which is no longer a part."""


def taken(stored: Any, spans: Iterable[Span], axis: int) -> Tensor:
    """These spans of a tensor, or of a slice of a file, of which no more is read; side by side, copied.

    Args:
        stored: has as many axes as it likes.
        spans: of one axis.
        axis: counted from the last one, -1.
    """
    axes = stored.dim() if isinstance(stored, Tensor) else len(stored.get_shape())
    before = (slice(None),) * (axes + axis)
    return torch.cat([stored[(*before, slice(*span))] for span in spans], dim=axis)


@dataclass(frozen=True)
class Cut:
    """What one rank holds of a linear layer, by outputs or by inputs: these spans, side by side."""

    side: Literal["outputs", "inputs"]
    spans: tuple[Span, ...]
    first: bool = True
    """Whether the rank is the first, which alone adds the bias of a layer that is cut by inputs."""

    @property
    def size(self) -> int:
        """Outputs or inputs that are held."""
        return sum(stop - start for start, stop in self.spans)

    def axis(self, *, turned: bool = False) -> int:
        """Which axis of a weight (..., out, in) is cut, or of one that is (..., in, out)."""
        return -2 if (self.side == "outputs") != turned else -1

    def of_weight(self, weight: Any, *, turned: bool = False) -> Tensor:
        """(..., out, in), a tensor or a slice of a file that is read so far only -> what is held of it.

        A `turned` one is (..., in, out), before and after.
        """
        return taken(weight, self.spans, self.axis(turned=turned))

    def of_bias(self, bias: Any) -> Tensor:
        """(..., out) -> what is held of it; zeros where another rank adds it."""
        if self.side == "outputs":
            return taken(bias, self.spans, -1)
        whole: Tensor = bias[:]
        return whole if self.first else torch.zeros_like(whole)

    def within(self, start: int, stop: int) -> "Cut":
        """Of some of the outputs alone, counted from the first of these. Inputs are cut alike for all."""
        if self.side == "inputs":
            return self
        inside = ((max(first, start), min(last, stop)) for first, last in self.spans)
        return Cut("outputs", tuple((first - start, last - start) for first, last in inside if first < last))


def spans_of(size: int, count: int, unit: int = 1) -> list[Span]:
    """Divide so many into as equal parts as whole units allow, larger ones first; the last unit may be shorter.

    Raises:
        ValueError: fewer units than parts.
    """
    units = -(-size // unit)
    if units < count:
        raise ValueError(f"{size} in units of {unit} cannot be divided by {count}")
    bounds = [min(unit * (units // count * part + min(part, units % count)), size) for part in range(count + 1)]
    return list(pairwise(bounds))


def head_spans(heads: int, kv_heads: int, rank: int, count: int) -> tuple[Span, Span]:
    """The heads of one rank: of queries, and the keys and values that they read.

    Raises:
        ValueError: they cannot be divided so that each query head finds its key head.
    """
    if kv_heads >= count:
        start, stop = spans_of(kv_heads, count)[rank]
        group = heads // kv_heads
        return (start * group, stop * group), (start, stop)
    if heads % count or count % kv_heads:
        raise ValueError(f"{heads} heads and {kv_heads} key heads cannot be divided by {count}")
    each, own = heads // count, rank * kv_heads // count
    return (rank * each, (rank + 1) * each), (own, own + 1)
