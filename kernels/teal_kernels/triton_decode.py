"""What a decoded token needs beside its sparse products: embedding, attention and output layer.

One launch each, for the Llama family of blocks. Shapes use B rows (sequences decoded together),
H hidden size, A attention heads, K key/value heads, D head size, N cache positions, V vocabulary.
Each row of a batch is at a position of its own. Nothing here synchronises with the host, so that a
whole token can be one CUDA graph.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from teal_kernels.launching import LEAST_TILE, TRITON_MISSING, launch, power_of_two
from teal_kernels.operands import AttentionPartials, Norm, Positions

if TRITON_MISSING is None:
    from teal_kernels.jit_decode import (
        best_kernel,
        embed_kernel,
        merged_norm_kernel,
        norm_kernel,
        output_kernel,
        pick_kernel,
    )


def embed(
    token: Tensor,
    embedding: Tensor,
    positions: Positions,
    hidden: Tensor,
    squares: Tensor,
    *,
    of_positions: Tensor | None = None,
    offset: int = 0,
    scale: float = 1.0,
    pdl: bool,
) -> None:
    """Begin a token of every row: look its embedding up and move the row's position on.

    Args:
        token: (B,) int64.
        embedding: (V, H), in any layout.
        positions: each row's last written position; becomes that of its new token.
        hidden: (B, H), written.
        squares: (B, 1) float32, written: the sum of squares of each row of `hidden`; (2, B, 1): and the sum of the row.
        of_positions: (positions, H) contiguous, an embedding of positions that is added; None for none.
        offset: of a position's row in it from the position.
        scale: of the token's embedding.
        pdl: launch while the kernel before still runs.
    """
    size = hidden.shape[1]
    launch(
        embed_kernel,
        (hidden.shape[0],),
        token,
        embedding,
        positions.own,
        positions.longest,
        hidden,
        squares,
        hidden if of_positions is None else of_positions,
        size,
        *embedding.stride(),
        offset,
        scale,
        ROWS=hidden.shape[0],
        BLOCK=power_of_two(size),
        SCALED=scale != 1.0,
        LEARNED=of_positions is not None,
        SUMS=squares.dim() == 3,
        warps=8,
        pdl=pdl,
    )


@dataclass(frozen=True)
class Best:
    """The best logit of each block of the vocabulary, and its token; `pick` reads them."""

    logits: Tensor
    """(B, blocks) float32; of a block with a NaN it is infinite."""
    tokens: Tensor
    """(B, blocks) int32."""

    @classmethod
    def empty(cls, rows: int, vocabulary: int, device: torch.device, *, block: int = 0) -> "Best":
        """Uninitialised, for blocks of so many logits; by default those of `output_logits`."""
        shape = (rows, -(-vocabulary // (block or _output_block(rows))))
        return cls(torch.empty(shape, device=device), torch.empty(shape, dtype=torch.int32, device=device))


_OUTPUT_BLOCK = 16
"""Logits of one program."""
_OUTPUT_INPUTS = 256
"""Inputs that it takes at a time. A token of Gemma-3-4B's shapes took 77 microseconds less than with 8 logits, 1,024
inputs and 8 warps (H200)."""
_BATCH_OUTPUT_BLOCK = 128
"""Of one that takes a batch, whose sums are not kept for every input of a tile."""
_BATCH_OUTPUT_BYTES = 256
"""Of each row of weights that such a program takes at a time."""


def _output_block(rows: int) -> int:
    """Logits of one program of `output_logits`."""
    return _OUTPUT_BLOCK if rows == 1 else _BATCH_OUTPUT_BLOCK


def output_logits(
    hidden: Tensor,
    norm: Norm | None,
    weight: Tensor,
    bias: Tensor | None,
    logits: Tensor,
    best: Best,
    *,
    scale: float = 1.0,
    cap: float = 0.0,
    pdl: bool = False,
) -> None:
    """The last norm and the output layer.

    Args:
        hidden: (B, H).
        norm: the model's last norm, with the sums of squares of `hidden`; None where it is normalised already.
        weight: (V, H), contiguous.
        bias: (V,) or None.
        logits: (B, V), written.
        best: written, for `pick`.
        scale: of the logits.
        cap: the soft cap of the scaled logits; 0 for none.
        pdl: launch while the kernel before still runs.
    """
    rows, n_in = hidden.shape
    vocabulary = weight.shape[0]
    squares = 1 if norm is None else norm.squares.shape[1]
    most = _OUTPUT_INPUTS if rows == 1 else _BATCH_OUTPUT_BYTES // weight.itemsize
    launch(
        output_kernel,
        (best.logits.shape[1],),
        hidden,
        hidden if norm is None else norm.weight,
        best.logits if norm is None else norm.squares,
        weight,
        hidden if bias is None else bias,
        logits,
        best.logits,
        best.tokens,
        n_in,
        vocabulary,
        squares,
        0.0 if norm is None else norm.eps,
        scale,
        cap,
        ROWS=rows,
        SQUARES=power_of_two(squares),
        HAS_BIAS=bias is not None,
        BLOCK_OUT=_output_block(rows),
        BLOCK_IN=min(most, max(LEAST_TILE, power_of_two(n_in))),
        NORM=norm is not None,
        PLUS_ONE=norm is not None and norm.plus_one,
        SCALED=scale != 1.0,
        CAPPED=cap != 0.0,
        warps=4 if rows == 1 else 8,
        pdl=pdl,
    )


LOGITS_BLOCK = 512
"""Logits of a program of `find_best`."""


def find_best(logits: Tensor, best: Best, *, scale: float = 1.0, cap: float = 0.0, pdl: bool = False) -> None:
    """The best of each block of logits that another product has written: `Best` of blocks of `LOGITS_BLOCK`.

    Before that the logits are scaled and capped in place, as `output_logits` does.
    """
    rows, vocabulary = logits.shape
    launch(
        best_kernel,
        (best.logits.shape[1], rows),
        logits,
        best.logits,
        best.tokens,
        vocabulary,
        scale,
        cap,
        BLOCK=LOGITS_BLOCK,
        SCALED=scale != 1.0,
        CAPPED=cap != 0.0,
        warps=4,
        pdl=pdl,
    )


_PICKED = 8192
"""Blocks that `pick` looks at together: as many as registers hold. With 65,536 it took 31 microseconds (H200)."""


def pick(best: Best, token: Tensor, read: Tensor, *, pdl: bool = False) -> None:
    """The greedy token of every row.

    Args:
        best: of the row's logits.
        token: (B,) int64, written.
        read: (B, 2) int64, contiguous, written: the token again, and 1 where no logit is NaN and the best is finite.
        pdl: launch while the kernel before still runs.
    """
    rows, blocks = best.logits.shape
    launch(
        pick_kernel,
        (rows,),
        best.logits,
        best.tokens,
        token,
        read,
        blocks,
        BLOCK=min(_PICKED, power_of_two(blocks)),
        warps=16,
        pdl=pdl,
    )


def write_norm(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    *,
    eps: float,
    bias: Tensor | None = None,
    centred: bool = False,
    plus_one: bool = False,
    squares: Tensor | None = None,
    added: bool = False,
    scale: float = 1.0,
    stream_scale: float = 1.0,
    pdl: bool = False,
) -> None:
    """A norm by itself, where no product takes it up as it reads its inputs.

    Args:
        x: (B, H), contiguous.
        weight: (H,)
        y: (B, H), written.
        eps: of the norm.
        bias: (H,) or None.
        centred: whether the mean is taken off first: a layer norm.
        plus_one: whether it multiplies by 1 + weight.
        squares: (B, 1) float32: the sum of squares of y is written here; with a layer norm (2, B, 1), and the sum.
        added: the norm is added to y, in the place of what is there.
        scale: of what is added.
        stream_scale: of y, after something was added to it.
        pdl: launch while the kernel before still runs.
    """
    rows, size = x.shape
    launch(
        norm_kernel,
        (rows,),
        x,
        weight,
        weight if bias is None else bias,
        y,
        x if squares is None else squares,
        size,
        eps,
        scale,
        None if stream_scale == 1.0 else stream_scale,
        BLOCK=power_of_two(size),
        CENTRED=centred,
        PLUS_ONE=plus_one,
        HAS_BIAS=bias is not None,
        ADDED=added,
        SQUARES=squares is not None,
        SCALED=scale != 1.0,
        warps=8,
        pdl=pdl,
    )


def write_norm_of_partials(
    partials: AttentionPartials,
    weight: Tensor,
    y: Tensor,
    *,
    eps: float,
    bias: Tensor | None = None,
    centred: bool = False,
    plus_one: bool = False,
    pdl: bool = False,
) -> None:
    """Merge what attention left, round it to the dtype of y, and write its norm.

    Args:
        partials: of heads of H values together.
        weight: (H,)
        y: (B, H), written.
        eps, bias, centred, plus_one: as `write_norm` has them.
        pdl: launch while the kernel before still runs.
    """
    rows, size = y.shape
    launch(
        merged_norm_kernel,
        (rows,),
        partials.sums,
        partials.logs,
        partials.positions.longest,
        weight,
        weight if bias is None else bias,
        y,
        size,
        partials.window,
        eps,
        HEAD_SIZE=partials.head_size,
        SPLITS=partials.splits,
        MULTIPLE=partials.split_multiple,
        BLOCK=power_of_two(size),
        CENTRED=centred,
        PLUS_ONE=plus_one,
        HAS_BIAS=bias is not None,
        warps=8,
        pdl=pdl,
    )
