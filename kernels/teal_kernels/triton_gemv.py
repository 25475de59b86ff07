"""Triton backend: one decoded token's matrix-vector product that reads only the rows that matter.

The weight is an input-major table (in, out): one row per input. A program owns a block of outputs
and a stretch of the inputs. It lists the inputs of its stretch that are above the threshold, adds
up their rows in float32 and writes one line of partial sums. The program that arrives last at a
block of outputs adds the partial sums in a fixed order and finishes the block, so there is no
second launch, no output to clear and no floating-point atomic: the same inputs give the same bits
on every run.

Around the product the kernel takes up what would otherwise be launches of their own: before it the
RMS norm (`NORM`), after it the bias, the residual sum with its sum of squares (`RESIDUAL`) or the
gated activation (`GATED`). Several projections that read one hidden state are parts of one table,
each with its own threshold.

Importable without triton; without a GPU it runs under TRITON_INTERPRET=1.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from teal_kernels.launching import TRITON_MISSING, interpreting, launch, power_of_two

if TRITON_MISSING is None:
    from teal_kernels.jit_gemv import gemv_kernel


@dataclass(frozen=True)
class GemvConfig:
    """How one product is cut up."""

    block_out: int
    """Outputs of a program (power of two)."""
    block_in: int
    """Rows of weights in a tile (power of two)."""
    unroll: int
    """Tiles in flight at a time."""
    inputs_per_split: int
    """Inputs of a program."""
    warps: int
    ahead: int = 0
    """Rows of each stretch that are fetched into the L2 cache before the inputs are known (power of two)."""
    dense: bool = False
    """Read every row, and do not list."""
    evict_first: bool = True
    """Let the weights leave the L2 cache before anything else does."""


class Workspace:
    """Scratch memory that kernels share, one after the other on one stream.

    Counters of arrivals are zero between launches: the program that arrives last resets its own.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._tensors: dict[str, Tensor] = {}
        self._replaced: list[Tensor] = []  # a captured graph may hold their addresses

    def tensor(self, name: str, elements: int, dtype: torch.dtype) -> Tensor:
        """A tensor of at least that many elements, zero when it is made."""
        held = self._tensors.get(name)
        if held is None or held.numel() < elements or held.dtype != dtype:
            if held is not None:
                self._replaced.append(held)
            self._tensors[name] = held = torch.zeros(elements, dtype=dtype, device=self.device)
        return held


@dataclass(frozen=True)
class Norm:
    """An RMS norm in front of a product."""

    weight: Tensor
    """(in,)"""
    eps: float
    squares: Tensor
    """(rows, n) float32: partial sums of the squares of x, from the kernel that wrote x."""


# The gathering of partial sums must not need more registers than the loop over weights does.
_GATHERED_REGISTERS = 32
MAX_ROWS = 8
"""Rows of a batch that one launch takes: each has its sums in registers."""
_FINISHES = {"plain": 0, "residual": 1, "gated": 2}


def squares_of(parts: tuple[int, ...], config: GemvConfig) -> int:
    """Partial sums of squares that a `residual` product writes for each row."""
    return sum(-(-part // config.block_out) for part in parts)


@lru_cache(maxsize=16)
def _can_fetch(device: torch.device) -> bool:
    return device.type == "cuda" and not interpreting() and torch.cuda.get_device_capability(device) >= (9, 0)


def gemv(
    x: Tensor,
    table: Tensor,
    parts: tuple[int, ...],
    thresholds: Tensor,
    y: Tensor,
    config: GemvConfig,
    workspace: Workspace,
    *,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    finish: str = "plain",
    squares: Tensor | None = None,
    counts: Tensor | None = None,
    pdl: bool = False,
    compile_only: bool = False,
) -> None:
    """One launch: norm, threshold, product and what follows it.

    Args:
        x: (rows, in), contiguous, rows from 1 to 8.
        table: (in, out), each row contiguous; the dtype of x.
        parts: outputs of each projection in the table, at most three.
        thresholds: (parts,) float32: inputs with |x| <= threshold are dropped; below zero none is.
        y: (rows, out), written. With `residual` it is added to; with `gated` it is (rows, out / 2).
        config: how the product is cut up.
        workspace: scratch.
        bias: (out,) or None.
        norm: an RMS norm of x before all else.
        finish: `plain`; `residual`: y += product; `gated`: y = silu(first part) * second part.
        squares: (rows, `squares_of`) float32, written by `residual`: partial sums of y's squares.
        counts: (parts,) int64: how many inputs were kept is added to it.
        pdl: launch while the kernel before still runs.
        compile_only: compile what would be launched.
    """
    rows, n_in = x.shape
    if finish == "residual" and (squares is None or squares.shape != (rows, squares_of(parts, config))):
        raise ValueError(f"a residual product needs squares of shape {(rows, squares_of(parts, config))}")
    total = sum(parts)
    part_0, part_1, part_2 = (*parts, 0, 0)[:3]
    blocks = squares_of(parts, config)
    splits = -(-n_in // config.inputs_per_split)
    stretch = power_of_two(config.inputs_per_split)
    listed = not config.dense
    lines = blocks * splits * stretch
    gathered = _GATHERED_REGISTERS // (2 if finish == "gated" else 1)
    even = all(part % config.block_out == 0 for part in parts)
    # The fetch is Hopper's, and takes whole lines of 16 bytes inside the table.
    fetches = (
        _can_fetch(x.device) and even and table.stride(0) * table.itemsize % 16 == 0 and table.data_ptr() % 16 == 0
    )
    launch(
        gemv_kernel,
        (blocks, splits),
        x,
        x if norm is None else norm.weight,
        thresholds if norm is None else norm.squares,
        table,
        thresholds,
        x if bias is None else bias,
        y,
        thresholds if squares is None else squares,
        workspace.tensor("partial", splits * rows * total, torch.float32),
        workspace.tensor("arrivals", blocks, torch.int32),
        workspace.tensor("list", lines if listed else 1, torch.int32),
        workspace.tensor(f"values {x.dtype}", lines * rows if listed or norm else 1, x.dtype),
        workspace.tensor("counts", 3, torch.int64) if counts is None else counts,
        n_in,
        table.stride(0),
        part_0,
        part_1,
        part_2,
        config.inputs_per_split,
        splits,
        1 if norm is None else norm.squares.shape[1],
        0.0 if norm is None else norm.eps,
        ROWS=rows,
        LISTED=listed,
        NORM=norm is not None,
        FINISH=_FINISHES[finish],
        HAS_BIAS=bias is not None,
        EVEN=even,
        SQUARES=1 if norm is None else power_of_two(norm.squares.shape[1]),
        SPLIT=splits > 1,
        LINES=max(1, min(power_of_two(splits), gathered * 32 * config.warps // config.block_out)),
        STRETCH=stretch,
        BLOCK_OUT=config.block_out,
        BLOCK_IN=config.block_in,
        UNROLL=config.unroll,
        AHEAD=config.ahead if fetches else 0,
        EVICT="evict_first" if config.evict_first else "",
        PDL=pdl,
        warps=config.warps,
        pdl=pdl,
        compile_only=compile_only,
    )
