"""What a decoded token's products read and write beside their tables: norms, what is still to be added, partials.

Importable without triton.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class Scratch:
    """Scratch memory that kernels share, one after the other on one stream.

    Places for partial sums are empty between launches: who takes the sums empties them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._tensors: dict[str, Tensor] = {}
        self._replaced: list[Tensor] = []  # a captured graph may hold their addresses

    def tensor(self, name: str, elements: int, dtype: torch.dtype, fill: int | None = None) -> Tensor:
        """A tensor of at least that many elements, filled when it is made if `fill` is given."""
        held = self._tensors.get(name)
        if held is None or held.numel() < elements or held.dtype != dtype:
            if held is not None:
                self._replaced.append(held)
            held = torch.empty(elements, dtype=dtype, device=self.device)
            self._tensors[name] = held if fill is None else held.fill_(fill)
        return held


@dataclass(frozen=True)
class Norm:
    """A norm in front of a product: an RMS norm, or a layer norm where `centred`."""

    weight: Tensor
    """(in,)"""
    eps: float
    squares: Tensor
    """(rows, n) float32: partial sums of the squares of x, from the kernel that wrote x; for a layer norm (2, rows, n),
    the second of x itself."""
    plus_one: bool = False
    """Whether it multiplies by 1 + weight, as Gemma's do."""
    centred: bool = False
    bias: Tensor | None = None
    """(in,), of a layer norm."""


@dataclass(frozen=True)
class Added:
    """Of one row: an RMS norm of y that is still to be added to the residual stream, which is the input."""

    y: Tensor
    """(1, in), of a product with the epilogue `beside`, which wrote `sums`."""
    weight: Tensor
    eps: float
    plus_one: bool
    scale: float
    """Of what is added."""
    sums: Tensor
    """(4, n) float32: partial sums of y y, h h, h w y and w y w y, h the stream and w the norm's weight."""
    stream: Tensor
    """(1, in), written: the stream after it. Not the memory of the input, which other programs still read."""


@dataclass(frozen=True)
class Beside:
    """What the epilogue `beside` reads, for an `Added` of the product that follows."""

    stream: Tensor
    """(1, out)"""
    weight: Tensor
    """(out,) of the norm."""
    plus_one: bool


@dataclass(frozen=True)
class Positions:
    """Where the rows of a batch are in their sequences."""

    own: Tensor
    """(rows,) int32: of each row's token."""
    longest: Tensor
    """(1,) int32: the highest of them, from which the splits of the KV cache follow; of one row `own` itself."""

    @classmethod
    def at(cls, positions: Sequence[int], device: torch.device | str) -> "Positions":
        """Of rows at these positions."""
        own = torch.tensor(positions, dtype=torch.int32, device=device)
        return cls(own, own if len(positions) == 1 else own.amax(0, keepdim=True))


@dataclass(frozen=True)
class AttentionPartials:
    """What attention leaves for the product after it: split-KV partials, for each query head one of each split.

    That product merges them as it reads them. Were they merged by attention, its programs would wait for
    one another with nothing to read: 2 of its 6 microseconds on an H100, at any length of the context.
    """

    sums: Tensor
    """(splits, rows, heads D) float32: weighted averages of values."""
    logs: Tensor
    """(splits, rows, heads) float32: logarithms, to the base of 2, of the sums of the weights."""
    positions: Positions
    """Of each row's token. How many partials the rows have follows from it. What the longest row has and another has
    not is read all the same: its sums are 0 and its logarithms minus infinity."""
    window: int = 0
    """Positions that are seen, the new one included; 0 for all."""
    split_multiple: int = 64
    """A split is a multiple of so many positions."""

    def __post_init__(self) -> None:
        own = self.positions.own
        if own.shape != self.sums.shape[1:2]:
            raise ValueError(f"{self.sums.shape[1]} rows need as many positions, not {tuple(own.shape)}")

    @property
    def splits(self) -> int:
        """Of the KV cache at most."""
        return self.sums.shape[0]

    @property
    def head_size(self) -> int:
        """D."""
        return self.sums.shape[2] // self.logs.shape[2]

    @classmethod
    def empty(
        cls, rows: int, heads: int, dim: int, splits: int, positions: Positions, **options: int
    ) -> "AttentionPartials":
        """Not written yet."""
        sums = torch.empty(splits, rows, heads * dim, dtype=torch.float32, device=positions.own.device)
        return cls(sums, sums.new_empty(splits, rows, heads), positions, **options)
