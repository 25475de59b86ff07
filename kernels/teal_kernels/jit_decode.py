"""The kernels of `teal_kernels.triton_decode` but attention. Triton's language, so not type-checked."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from teal_kernels.jit_common import (
    LEAST_TILE,
    layer_normalised,
    matmul,
    normalised,
    rms_scale,
    rms_scales,
    rounded,
    tanh,
)
from teal_kernels.jit_partials import split_of_cache


@triton.jit
def embed_kernel(
    token_ptr,
    embedding_ptr,
    positions_ptr,
    longest_ptr,
    hidden_ptr,
    squares_ptr,
    of_positions_ptr,
    hidden_size,
    token_stride,
    stride,
    offset,
    scale,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALED: tl.constexpr,
    LEARNED: tl.constexpr,
    SUMS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Look the token of a row up, and where positions are LEARNED its own, which moves on."""
    row = tl.program_id(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    position = tl.load(positions_ptr + row) + 1
    if LEARNED:
        tl.debug_barrier()  # all warps have read it before one of them moves it on
    tl.store(positions_ptr + row, position)
    if ROWS > 1:
        if row == 0:
            tl.store(longest_ptr, tl.load(longest_ptr) + 1)
    token = tl.load(token_ptr + row)
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden_size
    hidden = tl.load(embedding_ptr + token * token_stride + columns.to(tl.int64) * stride, mask=inside, other=0.0)
    dtype = hidden_ptr.dtype.element_ty
    if SCALED:
        hidden = (hidden.to(tl.float32) * scale).to(dtype)
    if LEARNED:
        at = of_positions_ptr + (position + offset).to(tl.int64) * hidden_size + columns
        hidden = (hidden.to(tl.float32) + tl.load(at, mask=inside, other=0.0).to(tl.float32)).to(dtype)
    tl.store(hidden_ptr + row * hidden_size + columns, hidden, mask=inside)
    tl.store(squares_ptr + row, tl.sum(hidden.to(tl.float32) * hidden.to(tl.float32), axis=0))
    if SUMS:
        tl.store(squares_ptr + ROWS + row, tl.sum(hidden.to(tl.float32), axis=0))


@triton.jit
def _keep_best(y, outs, row, vocabulary, best_ptr, best_token_ptr):
    """Write the best of a program's logits (float32, -inf outside the vocabulary) and its token.

    A NaN is the best, as torch.argmax has it, and written as infinite: a maximum may pass it by.
    """
    y = tl.where(y == y, y, float("inf"))
    top = tl.max(y, axis=0)
    block = row * tl.num_programs(0) + tl.program_id(0)
    tl.store(best_ptr + block, top)
    tl.store(best_token_ptr + block, tl.min(tl.where(y == top, outs, vocabulary - 1), axis=0))


@triton.jit
def _scaled_logits(y, scale, cap, SCALED: tl.constexpr, CAPPED: tl.constexpr):
    """Scaled, then capped softly, and rounded where transformers rounds."""
    dtype = y.dtype
    if SCALED:
        y = (y.to(tl.float32) * scale).to(dtype)
    if CAPPED:
        y = rounded(tanh(rounded(y.to(tl.float32) / cap, dtype)), dtype)
        y = (y * cap).to(dtype)
    return y


@triton.jit
def output_kernel(
    x_ptr,
    norm_ptr,
    squares_ptr,
    weight_ptr,
    bias_ptr,
    logits_ptr,
    best_ptr,
    best_token_ptr,
    n_in,
    vocabulary,
    n_squares,
    eps,
    logits_scale,
    cap,
    ROWS: tl.constexpr,
    SQUARES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    NORM: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
    PDL: tl.constexpr,
):
    """The norm and the dense output layer, whose weight is (V, H) row by row as the embedding's is.

    One row is multiplied by FMA instructions, as `jit_sums` does; more rows are what tensor cores are for.
    """
    outs = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    rows = tl.arange(0, LEAST_TILE)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    dtype = x_ptr.dtype.element_ty
    scale = 1.0
    if ROWS == 1:
        if NORM:
            scale = rms_scale(squares_ptr, n_squares, n_in, eps, SQUARES)
        acc = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    else:
        if NORM:
            scale = rms_scales(squares_ptr, n_squares, n_in, eps, SQUARES, ROWS)[None, :]
        acc = tl.zeros((BLOCK_OUT, LEAST_TILE), tl.float32)
    for start in range(0, n_in, BLOCK_IN):
        ins = start + tl.arange(0, BLOCK_IN)
        inside = ins < n_in
        w = tl.load(
            weight_ptr + outs.to(tl.int64)[:, None] * n_in + ins[None, :],
            mask=(outs < vocabulary)[:, None] & inside[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        if NORM:
            norm = tl.load(norm_ptr + ins, mask=inside, other=0.0)
        if ROWS == 1:
            x = tl.load(x_ptr + ins, mask=inside, other=0.0)
            x = normalised(x, scale, norm, dtype, PLUS_ONE) if NORM else x.to(tl.float32)
            acc += w.to(tl.float32) * x[None, :]
        else:
            there = inside[:, None] & (rows < ROWS)[None, :]
            x = tl.load(x_ptr + rows[None, :] * n_in + ins[:, None], mask=there, other=0.0)
            if NORM:
                x = normalised(x, scale, norm[:, None], dtype, PLUS_ONE).to(dtype)
            acc = matmul(w, x, acc)
    for row in tl.static_range(ROWS):
        y = tl.sum(acc if ROWS == 1 else tl.where((rows == row)[None, :], acc, 0.0), axis=1)
        if HAS_BIAS:
            y += tl.load(bias_ptr + outs, mask=outs < vocabulary, other=0.0).to(tl.float32)
        y = _scaled_logits(y.to(dtype), logits_scale, cap, SCALED, CAPPED)
        tl.store(logits_ptr + row * vocabulary + outs, y, mask=outs < vocabulary)
        # Compared as rounded: among equal logits the lowest token wins, as torch.argmax has it.
        y = tl.where(outs < vocabulary, y.to(tl.float32), float("-inf"))
        _keep_best(y, outs, row, vocabulary, best_ptr, best_token_ptr)


@triton.jit
def best_kernel(
    logits_ptr,
    best_ptr,
    best_token_ptr,
    vocabulary,
    logits_scale,
    cap,
    BLOCK: tl.constexpr,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
    PDL: tl.constexpr,
):
    """The best of a block of logits, as `output_kernel` finds it where it computes them; they are scaled first."""
    row = tl.program_id(1)
    outs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    at = logits_ptr + row * vocabulary + outs
    y = tl.load(at, mask=outs < vocabulary, other=float("-inf"))
    if SCALED or CAPPED:
        y = _scaled_logits(y, logits_scale, cap, SCALED, CAPPED)
        tl.store(at, y, mask=outs < vocabulary)
    y = tl.where(outs < vocabulary, y.to(tl.float32), float("-inf"))
    _keep_best(y, outs, row, vocabulary, best_ptr, best_token_ptr)


@triton.jit
def pick_kernel(best_ptr, best_token_ptr, token_ptr, read_ptr, n_blocks, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """The greedy token of one row, from the best of each block of logits, and whether it was chosen among numbers."""
    row = tl.program_id(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    best = tl.full((BLOCK,), float("-inf"), tl.float32)  # of the blocks that each lane has seen, and its token
    tokens = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, n_blocks, BLOCK):
        blocks = first + tl.arange(0, BLOCK)
        new = tl.load(best_ptr + row * n_blocks + blocks, mask=blocks < n_blocks, other=float("-inf"))
        token = tl.load(best_token_ptr + row * n_blocks + blocks, mask=blocks < n_blocks, other=0)
        better = (new > best) | (first == 0)  # of equals the first, whose token is lower
        best = tl.where(better, new, best)
        tokens = tl.where(better, token, tokens)
    top = tl.max(best, axis=0)
    token = tl.min(tl.where(best == top, tokens, 0x7FFFFFFF), axis=0).to(tl.int64)
    tl.store(token_ptr + row, token)
    tl.store(read_ptr + 2 * row, token)
    tl.store(read_ptr + 2 * row + 1, (tl.abs(top) < float("inf")).to(tl.int64))


@triton.jit
def _normed(x, weight, bias, inside, size, eps, dtype: tl.constexpr, CENTRED: tl.constexpr, PLUS_ONE: tl.constexpr):
    """The norm of one row, float32."""
    if CENTRED:
        x = tl.where(inside, x - tl.sum(x, axis=0) / size, 0.0)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / size + eps)
    if CENTRED:  # the mean is off already
        y = layer_normalised(x, 0.0, scale, weight, bias, dtype, PLUS_ONE)
    else:
        y = normalised(x, scale, weight, dtype, PLUS_ONE)
    return y


@triton.jit
def merged_norm_kernel(
    sums_ptr,
    logs_ptr,
    longest_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    size,
    window,
    eps,
    HEAD_SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    MULTIPLE: tl.constexpr,
    BLOCK: tl.constexpr,
    CENTRED: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    """The norm of a row that attention left as split-KV partials."""
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    bias = tl.zeros((BLOCK,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    _, _, used = split_of_cache(tl.load(longest_ptr), window, SPLITS, MULTIPLE)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    merged = total
    for split in range(used):  # the first has positions of every row, and so a finite logarithm
        of_row = split * tl.num_programs(0) + row
        log = tl.load(logs_ptr + of_row * (size // HEAD_SIZE) + columns // HEAD_SIZE, mask=inside, other=0.0)
        value = tl.load(sums_ptr + of_row * size + columns, mask=inside, other=0.0)
        higher = tl.maximum(top, log)
        shrink = tl.exp2(top - higher)
        share = tl.exp2(log - higher)
        merged = merged * shrink + share * value
        total = total * shrink + share
        top = higher
    dtype = y_ptr.dtype.element_ty
    x = tl.where(inside, rounded(merged / total, dtype), 0.0)
    y = _normed(x, weight, bias, inside, size, eps, dtype, CENTRED, PLUS_ONE)
    tl.store(y_ptr + row * size + columns, y.to(dtype), mask=inside)


@triton.jit
def norm_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    squares_ptr,
    size,
    eps,
    added_scale,
    stream_scale,
    BLOCK: tl.constexpr,
    CENTRED: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADDED: tl.constexpr,
    SQUARES: tl.constexpr,
    SCALED: tl.constexpr,
    PDL: tl.constexpr,
):
    """The norm of a row, written, or where ADDED added to `y`, which `stream_scale` multiplies if it is not None.

    With SQUARES the sum of squares of y is written too.
    """
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    bias = tl.zeros((BLOCK,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    dtype = y_ptr.dtype.element_ty
    at = row * size + columns
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if ADDED:
        before = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
    y = _normed(x, weight, bias, inside, size, eps, dtype, CENTRED, PLUS_ONE)
    if ADDED:
        if SCALED:
            y = rounded(y * added_scale, dtype)
        y = rounded(before + y, dtype)
        if stream_scale is not None:
            y = rounded(y * stream_scale, dtype)
    if SQUARES:
        tl.store(squares_ptr + row, tl.sum(y * y, axis=0))
        if CENTRED:
            tl.store(squares_ptr + tl.num_programs(0) + row, tl.sum(y, axis=0))
    tl.store(y_ptr + at, y.to(dtype), mask=inside)
