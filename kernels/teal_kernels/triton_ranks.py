"""Sums and gathers over ranks inside a token: one launch each, between the GPUs of one host, without a library.

Each rank has an inbox in memory that all others can write to. A rank sends float32 words straight into the inboxes of
the others and waits until theirs have come into its own. As in `triton_gemv`, a place that holds no word yet has the
bits of a NaN that no arithmetic makes. So each word is its own message: there is no flag, no fence and no barrier, and
a sum takes one way through the link. (NCCL's LL protocol sends words with flags for the same reason.)

All ranks add the words up in the order of ranks, so all have the same bits, in every run. The launch also adds the sum
to the residual stream and writes the partial sums of squares that the next norm reads, as the epilogue of a product on
one GPU does.

A place may be written again when its reader has emptied it. Each sum of a token has places of its own. A rank comes to
the same place of the next token only after it has had words of another sum from all ranks, which they send after they
have emptied these. So a token needs two sums or gathers at least.

Importable without triton; without a GPU it runs under TRITON_INTERPRET=1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from teal_kernels.launching import EMPTY, TRITON_MISSING, interpreting, launch

if TRITON_MISSING is None:
    from teal_kernels.jit_ranks import gather_ranks_kernel, sum_ranks_kernel

SUM_BLOCK = 256
"""Columns of a program of a sum."""
_GATHER_BLOCK = 512
LOOKS_A_SECOND = 2_500_000
"""How often about a program looks into its inbox while it waits."""


@dataclass(frozen=True)
class Inboxes:
    """The inboxes of all ranks, as one of them sees them."""

    rank: int
    words: Sequence[Tensor]
    """(places,) int32 of each rank, in memory that this one can write to; at first `EMPTY` everywhere."""
    most_looks: int = 60 * LOOKS_A_SECOND
    """After so many a rank that sends nothing is given up, and with it this process."""

    @classmethod
    def of_one(cls, device: torch.device) -> "Inboxes":
        """Of a rank that is alone: what it sums was summed by somebody else before."""
        return cls(0, [torch.empty(1, dtype=torch.int32, device=device)])

    def empty_(self) -> None:
        """Empty this rank's own; not while anything is under way."""
        self.words[self.rank].fill_(EMPTY)


def places_of_sum(ranks: int, rows: int, size: int) -> int:
    """Words of an inbox that a sum of (rows, size) takes; also a gather of so many columns of each rank."""
    return ranks * rows * size


def squares_of_sum(size: int) -> int:
    """Partial sums of squares that `sum_ranks` writes for each row."""
    return -(-size // SUM_BLOCK)


def sum_ranks(
    own: Tensor,
    inboxes: Inboxes,
    base: int,
    y: Tensor,
    *,
    added: bool,
    scale: float = 1.0,
    squares: Tensor | None = None,
    pdl: bool = False,
) -> None:
    """The sum of a tensor over all ranks.

    Args:
        own: (rows, size), this rank's.
        inboxes: of all ranks.
        base: first place of this sum in each inbox.
        y: (rows, size), written, or added to.
        added: whether the sum is added to y.
        scale: of what is added.
        squares: (rows, `squares_of_sum`) float32, written: partial sums of y's squares; (2, rows, n): and of y itself.
        pdl: launch while the kernel before still runs.
    """
    rows, size = own.shape
    launch(
        sum_ranks_kernel,
        (squares_of_sum(size), rows),
        own,
        tuple(inboxes.words),
        y,
        y if squares is None else squares,
        size,
        base,
        scale,
        inboxes.most_looks,
        ROWS=rows,
        RANK=inboxes.rank,
        RANKS=len(inboxes.words),
        BLOCK=SUM_BLOCK,
        ADDED=added,
        SCALED=scale != 1.0,
        SQUARES=squares is not None,
        SUMS=squares is not None and squares.dim() == 3,
        TRAPS=not interpreting(),
        warps=4,
        pdl=pdl,
    )


def gather_ranks(own: Tensor, inboxes: Inboxes, base: int, y: Tensor, *, pdl: bool = False) -> None:
    """The columns of all ranks, side by side.

    Args:
        own: (rows, width), this rank's.
        inboxes: of all ranks.
        base: first place of this gather in each inbox.
        y: (rows, size), written; what the ranks have beyond `size` columns is left out.
        pdl: launch while the kernel before still runs.
    """
    rows, width = own.shape
    launch(
        gather_ranks_kernel,
        (-(-width // _GATHER_BLOCK), rows),
        own,
        tuple(inboxes.words),
        y,
        width,
        y.shape[1],
        base,
        inboxes.most_looks,
        ROWS=rows,
        RANK=inboxes.rank,
        RANKS=len(inboxes.words),
        BLOCK=_GATHER_BLOCK,
        TRAPS=not interpreting(),
        warps=4,
        pdl=pdl,
    )
