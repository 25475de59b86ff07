"""The kernels of `teal_kernels.triton_decode`. Triton's language, so not type-checked."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from teal_kernels.jit_common import LEAST_TILE, matmul, normalised, rms_scale, rms_scales
from teal_kernels.jit_partials import split_of_cache


@triton.jit
def embed_kernel(
    token_ptr,
    embedding_ptr,
    positions_ptr,
    longest_ptr,
    hidden_ptr,
    squares_ptr,
    hidden_size,
    token_stride,
    stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Look the token of a row up; the first program also moves all positions on."""
    row = tl.program_id(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if row == 0:
        longest = tl.load(positions_ptr) + 1
        tl.store(positions_ptr, longest)
        if ROWS > 1:
            for other in tl.static_range(1, ROWS):
                position = tl.load(positions_ptr + other) + 1
                tl.store(positions_ptr + other, position)
                longest = tl.maximum(longest, position)
            tl.store(longest_ptr, longest)
    token = tl.load(token_ptr + row)
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden_size
    hidden = tl.load(embedding_ptr + token * token_stride + columns.to(tl.int64) * stride, mask=inside, other=0.0)
    tl.store(hidden_ptr + row * hidden_size + columns, hidden, mask=inside)
    tl.store(squares_ptr + row, tl.sum(hidden.to(tl.float32) * hidden.to(tl.float32), axis=0))


@triton.jit
def _rotated(x, partner, norm, partner_norm, cos, sin, eps, DIM: tl.constexpr, NORM: tl.constexpr, dtype: tl.constexpr):
    """(heads, PADDED) of heads and of their other halves, normalised where asked and rotated.

    Rounded once, at the end, where transformers rounds each product of a 16-bit dtype.
    """
    x = x.to(tl.float32)
    partner = partner.to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / DIM + eps)[:, None]
        x = normalised(x, scale, norm[None, :], dtype)
        partner = normalised(partner, scale, partner_norm[None, :], dtype)
    return (x * cos[None, :] + partner * sin[None, :]).to(dtype)


@triton.jit
def attention_kernel(
    qkv_ptr,
    q_norm_ptr,
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    keys_ptr,
    values_ptr,
    positions_ptr,
    longest_ptr,
    sums_ptr,
    logs_ptr,
    kv_heads,
    positions,
    window,
    scale,
    eps,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    MULTIPLE: tl.constexpr,
    SEVERAL_ROWS: tl.constexpr,
    NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    """One key/value head and one split of the KV cache a program.

    It leaves a partial for each query head: what the values of its split average to, and the logarithm of their
    weights' sum. The product that follows merges the partials.
    """
    head = tl.program_id(0)
    split = tl.program_id(1)
    row = tl.program_id(2)
    # Everything up to the wait was written before the kernel that this one follows: it depends on
    # the row's position and on its older tokens, not on this token's projections.
    position = tl.load(positions_ptr + row)  # of the new token
    lowest, length, used = split_of_cache(position, window, SPLITS, MULTIPLE)
    if SEVERAL_ROWS:  # splits are as long for every row
        _, length, _ = split_of_cache(tl.load(longest_ptr), window, SPLITS, MULTIPLE)
        used = tl.cdiv(position + 1 - lowest, length)
    heads = GROUP * kv_heads
    if split >= used:
        if SEVERAL_ROWS:
            # Who merges the partials reads as many of every row as the longest row has: these weigh nothing.
            first = ((split * tl.num_programs(2) + row) * heads + head * GROUP).to(tl.int32)
            values_of_group = tl.arange(0, PADDED_GROUP * PADDED)
            in_values = values_of_group < GROUP * DIM
            tl.store(sums_ptr + first * DIM + values_of_group, 0.0, mask=in_values)
            heads_of_group = tl.arange(0, PADDED_GROUP)
            tl.store(logs_ptr + first + heads_of_group, float("-inf"), mask=heads_of_group < GROUP)
        return
    start = lowest + split * length
    stop = tl.minimum(start + length, position)

    dtype = qkv_ptr.dtype.element_ty
    group = tl.arange(0, PADDED_GROUP)
    in_group = group < GROUP
    d = tl.arange(0, PADDED)
    in_head = d < DIM
    other_half = (d + DIM // 2) % DIM
    cos = tl.load(cos_ptr + position * DIM + d, mask=in_head, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + position * DIM + d, mask=in_head, other=0.0).to(tl.float32)
    sin = tl.where(d < DIM // 2, -sin, sin)
    q_norm = cos
    q_partner_norm = cos
    k_norm = cos
    k_partner_norm = cos
    if NORM:
        q_norm = tl.load(q_norm_ptr + d, mask=in_head, other=0.0).to(tl.float32)
        q_partner_norm = tl.load(q_norm_ptr + other_half).to(tl.float32)
        k_norm = tl.load(k_norm_ptr + d, mask=in_head, other=0.0).to(tl.float32)
        k_partner_norm = tl.load(k_norm_ptr + other_half).to(tl.float32)
    cache = (row * kv_heads + head).to(tl.int64) * positions * DIM
    t = start + tl.arange(0, BLOCK)
    at = cache + t.to(tl.int64)[:, None] * DIM + d[None, :]
    written = (t < stop)[:, None] & in_head[None, :]
    next_k = tl.load(keys_ptr + at, mask=written, other=0.0)
    next_v = tl.load(values_ptr + at, mask=written, other=0.0)
    projections = qkv_ptr + row * (GROUP + 2) * kv_heads * DIM
    q_heads = projections + (head * GROUP + group)[:, None] * DIM
    q_inside = in_group[:, None] & in_head[None, :]
    k_head = projections + (GROUP * kv_heads + head + tl.arange(0, 1))[:, None] * DIM
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    # All loads first: they are under way together.
    q = tl.load(q_heads + d[None, :], mask=q_inside, other=0.0)
    q_partner = tl.load(q_heads + other_half[None, :], mask=q_inside, other=0.0)
    k_new = tl.load(k_head + d[None, :], mask=in_head[None, :], other=0.0)
    k_partner = tl.load(k_head + other_half[None, :], mask=in_head[None, :], other=0.0)
    v_new = tl.load(projections + ((GROUP + 1) * kv_heads + head) * DIM + d, mask=in_head, other=0.0)
    q = _rotated(q, q_partner, q_norm, q_partner_norm, cos, sin, eps, DIM, NORM, dtype)
    k_new = _rotated(k_new, k_partner, k_norm, k_partner_norm, cos, sin, eps, DIM, NORM, dtype)

    # The new token belongs to the last split, before all others of it.
    last = split == used - 1
    top = tl.sum(q.to(tl.float32) * k_new.to(tl.float32), axis=1) * scale
    maximum = tl.where(last, top, float("-inf"))
    weight_sum = tl.zeros((PADDED_GROUP,), tl.float32) + tl.where(last, 1.0, 0.0)
    acc = tl.zeros((PADDED_GROUP, PADDED), tl.float32) + tl.where(last, v_new.to(tl.float32), 0.0)[None, :]
    if last:
        new = cache + position.to(tl.int64) * DIM + d
        tl.store(keys_ptr + new, tl.reshape(k_new, (PADDED,)), mask=in_head)
        tl.store(values_ptr + new, v_new, mask=in_head)
    for first in range(start, stop, BLOCK):
        k = next_k
        v = next_v
        inside = first + tl.arange(0, BLOCK) < stop
        t = first + BLOCK + tl.arange(0, BLOCK)
        at = cache + t.to(tl.int64)[:, None] * DIM + d[None, :]
        written = (t < stop)[:, None] & in_head[None, :]
        next_k = tl.load(keys_ptr + at, mask=written, other=0.0)
        next_v = tl.load(values_ptr + at, mask=written, other=0.0)
        score = matmul(q, tl.trans(k), tl.zeros((PADDED_GROUP, BLOCK), tl.float32)) * scale
        score = tl.where(inside[None, :], score, float("-inf"))
        higher = tl.maximum(maximum, tl.max(score, axis=1))
        share = tl.exp(score - higher[:, None])
        shrink = tl.exp(maximum - higher)
        weight_sum = weight_sum * shrink + tl.sum(share, axis=1)
        acc = matmul(share.to(dtype), v, acc * shrink[:, None])
        maximum = higher

    average = acc / weight_sum[:, None]
    log = maximum * 1.4426950408889634 + tl.log2(weight_sum)
    own = (split * tl.num_programs(2) + row) * heads + head * GROUP + group
    tl.store(sums_ptr + own[:, None] * DIM + d[None, :], average, mask=q_inside)
    tl.store(logs_ptr + own, log, mask=in_group)


@triton.jit
def _keep_best(y, outs, row, vocabulary, best_ptr, best_token_ptr):
    """Write the best of a program's logits (float32, -inf outside the vocabulary) and its token."""
    top = tl.max(y, axis=0)
    block = row * tl.num_programs(0) + tl.program_id(0)
    tl.store(best_ptr + block, top)
    # NaN equals nothing: then the last token, which at least there is.
    tl.store(best_token_ptr + block, tl.min(tl.where(y == top, outs, vocabulary - 1), axis=0))


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
    ROWS: tl.constexpr,
    SQUARES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
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
    if ROWS == 1:
        scale = rms_scale(squares_ptr, n_squares, n_in, eps, SQUARES)
        acc = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    else:
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
        norm = tl.load(norm_ptr + ins, mask=inside, other=0.0)
        if ROWS == 1:
            x = normalised(tl.load(x_ptr + ins, mask=inside, other=0.0), scale, norm, dtype)
            acc += w.to(tl.float32) * x[None, :]
        else:
            there = inside[:, None] & (rows < ROWS)[None, :]
            x = tl.load(x_ptr + rows[None, :] * n_in + ins[:, None], mask=there, other=0.0)
            acc = matmul(w, normalised(x, scale, norm[:, None], dtype).to(dtype), acc)
    for row in tl.static_range(ROWS):
        y = tl.sum(acc if ROWS == 1 else tl.where((rows == row)[None, :], acc, 0.0), axis=1)
        if HAS_BIAS:
            y += tl.load(bias_ptr + outs, mask=outs < vocabulary, other=0.0).to(tl.float32)
        y = y.to(dtype)
        tl.store(logits_ptr + row * vocabulary + outs, y, mask=outs < vocabulary)
        # Compared as rounded: among equal logits the lowest token wins, as torch.argmax has it.
        y = tl.where(outs < vocabulary, y.to(tl.float32), float("-inf"))
        _keep_best(y, outs, row, vocabulary, best_ptr, best_token_ptr)


@triton.jit
def best_kernel(logits_ptr, best_ptr, best_token_ptr, vocabulary, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """The best of a block of logits, as `output_kernel` finds it where it computes them."""
    row = tl.program_id(1)
    outs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    y = tl.load(logits_ptr + row * vocabulary + outs, mask=outs < vocabulary, other=float("-inf")).to(tl.float32)
    _keep_best(y, outs, row, vocabulary, best_ptr, best_token_ptr)


@triton.jit
def pick_kernel(best_ptr, best_token_ptr, token_ptr, n_blocks, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """The greedy token of one row, from the best of each block of logits."""
    row = tl.program_id(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    blocks = tl.arange(0, BLOCK)
    best = tl.load(best_ptr + row * n_blocks + blocks, mask=blocks < n_blocks, other=float("-inf"))
    tokens = tl.load(best_token_ptr + row * n_blocks + blocks, mask=blocks < n_blocks, other=0)
    top = tl.max(best, axis=0)
    last = tl.max(tokens, axis=0)
    token = tl.min(tl.where(best == top, tokens, last), axis=0)
    tl.store(token_ptr + row, token.to(tl.int64))
