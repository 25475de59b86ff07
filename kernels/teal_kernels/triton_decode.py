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
from teal_kernels.triton_gemv import AttentionPartials, Norm, Positions

if TRITON_MISSING is None:
    from teal_kernels.jit_decode import attention_kernel, best_kernel, embed_kernel, output_kernel, pick_kernel


def embed(
    token: Tensor, embedding: Tensor, positions: Positions, hidden: Tensor, squares: Tensor, *, pdl: bool
) -> None:
    """Begin a token of every row: look its embedding up and move the row's position on.

    Args:
        token: (B,) int64.
        embedding: (V, H), in any layout.
        positions: each row's last written position; becomes that of its new token.
        hidden: (B, H), written.
        squares: (B, 1) float32, written: the sum of squares of each row of `hidden`.
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
        size,
        *embedding.stride(),
        ROWS=hidden.shape[0],
        BLOCK=power_of_two(size),
        warps=8,
        pdl=pdl,
    )


_ATTENTION_BLOCK = 64
"""Cache positions that a program takes at a time."""
_ATTENTION_WARPS = 4
_ATTENTION_PROGRAMS = 128
"""Programs to aim for: about one a multiprocessor of the GPUs that this is for."""
_MAX_SPLITS = 16
"""Splits at most: the programs of the product that follows read the partials of all."""


def attention_splits(programs: int) -> int:
    """Splits of the KV cache, for `programs` rows times key/value heads."""
    return max(1, min(_MAX_SPLITS, power_of_two(_ATTENTION_PROGRAMS // programs)))


def decode_attention(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    partials: AttentionPartials,
    *,
    scale: float,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    pdl: bool = False,
) -> None:
    """Rotary embedding, cache write and attention of one new token a row.

    Args:
        qkv: (B, (A + 2K) D): queries, keys, values of the new token, before rotation.
        keys: (B, K, N, D) cache; each row's own position is written. Contiguous.
        values: like keys.
        cos: (N or more, D) of the rotary embedding, both halves.
        sin: like cos.
        partials: written; its positions are where the new tokens go.
        scale: of the scores.
        q_norm: (D,) weight of an RMS norm of every query head (Qwen3), or None.
        k_norm: the same for keys.
        eps: of those norms.
        pdl: launch while the kernel before still runs. That one may write `qkv`; everything else is
            read before the wait for it.
    """
    rows, kv_heads, length, dim = keys.shape
    group = partials.logs.shape[2] // kv_heads
    padded = max(LEAST_TILE, power_of_two(dim))
    launch(
        attention_kernel,
        (kv_heads, partials.splits, rows),
        qkv,
        qkv if q_norm is None else q_norm,
        qkv if k_norm is None else k_norm,
        cos,
        sin,
        keys,
        values,
        partials.positions.own,
        partials.positions.longest,
        partials.sums,
        partials.logs,
        kv_heads,
        length,
        partials.window,
        scale,
        eps,
        GROUP=group,
        PADDED_GROUP=max(LEAST_TILE, power_of_two(group)),
        DIM=dim,
        PADDED=padded,
        BLOCK=_ATTENTION_BLOCK if keys.itemsize == 2 else _ATTENTION_BLOCK // 4,
        SPLITS=partials.splits,
        MULTIPLE=partials.split_multiple,
        SEVERAL_ROWS=rows > 1,
        NORM=q_norm is not None,
        warps=_ATTENTION_WARPS,
        pdl=pdl,
    )


@dataclass(frozen=True)
class Best:
    """The best logit of each block of the vocabulary, and its token; `pick` reads them."""

    logits: Tensor
    """(B, blocks) float32."""
    tokens: Tensor
    """(B, blocks) int32."""

    @classmethod
    def empty(cls, rows: int, vocabulary: int, device: torch.device, *, block: int = 0) -> "Best":
        """Uninitialised, for blocks of so many logits; by default those of `output_logits`."""
        shape = (rows, -(-vocabulary // (block or _output_block(rows))))
        return cls(torch.empty(shape, device=device), torch.empty(shape, dtype=torch.int32, device=device))


_OUTPUT_BLOCK = 8
"""Logits of one program."""
_BATCH_OUTPUT_BLOCK = 128
"""Of one that takes a batch, whose sums are not kept for every input of a tile."""
_BATCH_OUTPUT_BYTES = 256
"""Of each row of weights that such a program takes at a time."""


def _output_block(rows: int) -> int:
    """Logits of one program of `output_logits`."""
    return _OUTPUT_BLOCK if rows == 1 else _BATCH_OUTPUT_BLOCK


def output_logits(
    hidden: Tensor, norm: Norm, weight: Tensor, bias: Tensor | None, logits: Tensor, best: Best, *, pdl: bool = False
) -> None:
    """The last norm and the output layer.

    Args:
        hidden: (B, H).
        norm: the model's last norm, with the sums of squares of `hidden`.
        weight: (V, H), contiguous.
        bias: (V,) or None.
        logits: (B, V), written.
        best: written, for `pick`.
        pdl: launch while the kernel before still runs.
    """
    rows, n_in = hidden.shape
    vocabulary = weight.shape[0]
    most = 1024 if rows == 1 else _BATCH_OUTPUT_BYTES // weight.itemsize
    launch(
        output_kernel,
        (best.logits.shape[1],),
        hidden,
        norm.weight,
        norm.squares,
        weight,
        hidden if bias is None else bias,
        logits,
        best.logits,
        best.tokens,
        n_in,
        vocabulary,
        norm.squares.shape[1],
        norm.eps,
        ROWS=rows,
        SQUARES=power_of_two(norm.squares.shape[1]),
        HAS_BIAS=bias is not None,
        BLOCK_OUT=_output_block(rows),
        BLOCK_IN=min(most, max(LEAST_TILE, power_of_two(n_in))),
        warps=8,
        pdl=pdl,
    )


LOGITS_BLOCK = 512
"""Logits of a program of `find_best`."""


def find_best(logits: Tensor, best: Best, *, pdl: bool = False) -> None:
    """The best of each block of logits that another product has written: `Best` of blocks of `LOGITS_BLOCK`."""
    rows, vocabulary = logits.shape
    launch(
        best_kernel,
        (best.logits.shape[1], rows),
        logits,
        best.logits,
        best.tokens,
        vocabulary,
        BLOCK=LOGITS_BLOCK,
        warps=4,
        pdl=pdl,
    )


def pick(best: Best, token: Tensor, *, pdl: bool = False) -> None:
    """The greedy token of every row: (B,) int64, written."""
    rows, blocks = best.logits.shape
    launch(
        pick_kernel,
        (rows,),
        best.logits,
        best.tokens,
        token,
        blocks,
        BLOCK=power_of_two(blocks),
        warps=16,
        pdl=pdl,
    )
