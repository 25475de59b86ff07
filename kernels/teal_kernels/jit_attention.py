"""The attention kernel of `teal_kernels.triton_attention`. Triton's language, so not type-checked."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from teal_kernels import launching
from teal_kernels.jit_common import layer_normalised, matmul, normalised, rounded, tanh
from teal_kernels.jit_partials import split_of_cache

NO_NORM = tl.constexpr(launching.HEAD_NORMS["none"])
FIRST = tl.constexpr(launching.HEAD_NORMS["heads"])
LAST = tl.constexpr(launching.HEAD_NORMS["rotated_heads"])
ALL = tl.constexpr(launching.HEAD_NORMS["all_heads"])


@triton.jit
def _sum_of_squares(x_ptr, count, PADDED: tl.constexpr):
    each = tl.arange(0, PADDED)
    x = tl.load(x_ptr + each, mask=each < count, other=0.0).to(tl.float32)
    return tl.sum(x * x, axis=0)


@triton.jit
def _head_scale(x, eps, DIM: tl.constexpr):
    """What an RMS norm of each head multiplies it with: (heads, 1)."""
    return tl.rsqrt(tl.sum(x * x, axis=1) / DIM + eps)[:, None]


@triton.jit
def _head_moments(x, eps, HEADS: tl.constexpr):
    """The mean of each head, and what a layer norm multiplies the rest with: (heads, 1) each."""
    mean = tl.sum(x, axis=1) / HEADS.size
    in_head = tl.arange(0, HEADS.padded) < HEADS.size
    rest = tl.where(in_head[None, :], x - mean[:, None], 0.0)
    return mean[:, None], tl.rsqrt(tl.sum(rest * rest, axis=1) / HEADS.size + eps)[:, None]


@triton.jit
def _clamped(x, limit):
    """Between -limit and limit; NaN stays."""
    wide = x.to(tl.float32)
    return tl.where(wide > limit, limit, tl.where(wide < -limit, -limit, wide)).to(x.dtype)


@triton.jit
def _rotated(
    x,
    partner,
    norm,
    partner_norm,
    bias,
    partner_bias,
    scale,
    cos,
    sin,
    eps,
    HEADS: tl.constexpr,
    dtype: tl.constexpr,
):
    """(heads, PADDED) of heads and of what they are rotated with, normalised where asked and rotated.

    Rounded once, at the end, where transformers rounds each product of a 16-bit dtype.

    Args:
        norm, partner_norm: weights of the norm, (1 or heads, PADDED).
        bias, partner_bias: of a layer norm, the same.
        scale: of a norm of all heads.
        cos, sin: (1 or heads, PADDED).
    """
    x = x.to(tl.float32)
    partner = partner.to(tl.float32)
    if HEADS.centred:
        mean, scale = _head_moments(x, eps, HEADS)
        x = layer_normalised(x, mean, scale, norm, bias, dtype, HEADS.plus_one)
        partner = layer_normalised(partner, mean, scale, partner_norm, partner_bias, dtype, HEADS.plus_one)
    elif HEADS.norms == FIRST:
        scale = _head_scale(x, eps, HEADS.size)
    if (HEADS.norms == FIRST or HEADS.norms == ALL) and not HEADS.centred:
        x = normalised(x, scale, norm, dtype, HEADS.plus_one)
        partner = normalised(partner, scale, partner_norm, dtype, HEADS.plus_one)
    if HEADS.rotated > 0:
        x = x * cos + partner * sin
    if HEADS.norms == LAST:
        x = rounded(x, dtype)
        x = normalised(x, _head_scale(x, eps, HEADS.size), norm, dtype, HEADS.plus_one)
    return x.to(dtype)


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
    more,
    rare,
    PADDED_GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    MULTIPLE: tl.constexpr,
    SEVERAL_ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    SPAN: tl.constexpr,
    NEW: tl.constexpr,
    PDL: tl.constexpr,
):
    """One key/value head and one split of the KV cache a program.

    It leaves a partial for each query head: what the values of its split average to, and the logarithm of their
    weights' sum. The product that follows merges the partials.

    Args:
        more: `triton_attention.AttentionNumbers`, of which most models need none.
        rare: `triton_attention.RareOperands`, or None.
        HEADS: `triton_attention.HeadConstants`.
        SPAN: rows of one sequence, each a position behind the one before. From two on, each row makes the keys and
            values of the rows before it again, since no program may wait for what others of its launch write.
        NEW: keys that a row makes at most: 1, or those of a span, up to a tile.
    """
    GROUP: tl.constexpr = HEADS.group
    DIM: tl.constexpr = HEADS.size
    PADDED: tl.constexpr = HEADS.padded
    ROTATED: tl.constexpr = HEADS.rotated
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
    behind = row % SPAN  # rows of its sequence that come before it
    stop = tl.minimum(start + length, position - behind)
    # What is new belongs to the last split, before all others of it.
    last = split == used - 1

    dtype = qkv_ptr.dtype.element_ty
    group = tl.arange(0, PADDED_GROUP)
    in_group = group < GROUP
    d = tl.arange(0, PADDED)
    in_head = d < DIM
    turned = d < ROTATED
    if HEADS.neighbours:
        other = tl.where(turned, d ^ 1, d)
        first_of_pair = d % 2 == 0
    else:
        other = (d + ROTATED // 2) % ROTATED if ROTATED > 0 else d
        first_of_pair = d < ROTATED // 2
    if ROTATED < DIM:
        other = tl.where(turned, other, d)
    new = tl.arange(0, NEW)  # rows from the first of the sequence on; or this row alone
    at_new = position - behind + new  # where they are in the sequence
    makes = in_head[None, :]
    if SPAN > 1:
        sees = (new <= tl.where(last, behind, -1)) & (at_new >= lowest)
        makes = sees[:, None] & in_head[None, :]
    cos = tl.full((1, PADDED), 1.0, tl.float32)
    sin = tl.zeros((1, PADDED), tl.float32)
    k_cos = cos
    k_sin = sin
    if ROTATED > 0:
        at_angles = position * ROTATED + d[None, :]
        if HEADS.long_rope:  # the other angles lie behind, and the longest row decides for all
            at_angles += tl.where(tl.load(longest_ptr) >= more.long_from, more.angles, 0)
        rotates = turned[None, :]
        cos = tl.load(cos_ptr + at_angles, mask=rotates, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + at_angles, mask=rotates, other=0.0).to(tl.float32)
        sin = tl.where(first_of_pair[None, :], -sin, sin)
        k_cos = cos
        k_sin = sin
        if SPAN > 1:
            at_angles += (new - behind)[:, None] * ROTATED
            k_cos = tl.load(cos_ptr + at_angles, mask=makes & rotates, other=1.0).to(tl.float32)
            k_sin = tl.load(sin_ptr + at_angles, mask=makes & rotates, other=0.0).to(tl.float32)
            k_sin = tl.where(first_of_pair[None, :], -k_sin, k_sin)
    q_norm = cos
    q_partner_norm = q_norm
    k_norm = q_norm
    k_partner_norm = q_norm
    heads_of_group = (head * GROUP + group)[:, None] * DIM if HEADS.own_norms else tl.zeros((1, 1), tl.int32)
    key_head = head * DIM if HEADS.own_norms else 0
    if HEADS.norms != NO_NORM:
        of_queries = in_head[None, :]
        if HEADS.own_norms:
            of_queries &= in_group[:, None]
        q_norm = tl.load(q_norm_ptr + heads_of_group + d[None, :], mask=of_queries, other=0.0).to(tl.float32)
        k_norm = tl.load(k_norm_ptr + key_head + d[None, :], mask=in_head[None, :], other=0.0).to(tl.float32)
        if HEADS.norms != LAST:
            at_partner = heads_of_group + other[None, :]
            q_partner_norm = tl.load(q_norm_ptr + at_partner, mask=of_queries, other=0.0).to(tl.float32)
            at_partner = key_head + other[None, :]
            k_partner_norm = tl.load(k_norm_ptr + at_partner, mask=in_head[None, :], other=0.0).to(tl.float32)
    q_bias = tl.zeros((1, PADDED), tl.float32)
    q_partner_bias = q_bias
    k_bias = q_bias
    k_partner_bias = q_bias
    if HEADS.norm_biases:  # of one norm for all heads
        q_bias = tl.load(rare.q_bias + d[None, :], mask=in_head[None, :], other=0.0).to(tl.float32)
        q_partner_bias = tl.load(rare.q_bias + other[None, :], mask=in_head[None, :], other=0.0).to(tl.float32)
        k_bias = tl.load(rare.k_bias + d[None, :], mask=in_head[None, :], other=0.0).to(tl.float32)
        k_partner_bias = tl.load(rare.k_bias + other[None, :], mask=in_head[None, :], other=0.0).to(tl.float32)
    if HEADS.value_norms:
        v_norm = tl.load(rare.v_norm + d, mask=in_head, other=0.0).to(tl.float32)
    if HEADS.sinks:
        sinks = tl.load(rare.sinks + head * GROUP + group, mask=in_group, other=float("-inf")).to(tl.float32)
    if HEADS.alibi:
        of_alibi = rare.alibi + (head * GROUP + group)[:, None] * positions
        # Softmax is the same without what all keys have: far along, sums of small numbers with large ones lose digits.
        own_alibi = tl.load(rare.alibi + (head * GROUP + group) * positions + position, mask=in_group, other=0.0)
        if HEADS.sinks:
            sinks -= own_alibi
    cache = ((row // SPAN) * kv_heads + head).to(tl.int64) * positions * DIM
    t = start + tl.arange(0, BLOCK)
    at = cache + t.to(tl.int64)[:, None] * DIM + d[None, :]
    written = (t < stop)[:, None] & in_head[None, :]
    next_k = tl.load(keys_ptr + at, mask=written, other=0.0)
    next_v = tl.load(values_ptr + at, mask=written, other=0.0)
    of_row = (GROUP + 2) * kv_heads * DIM
    first_query = head * GROUP
    own_key = GROUP * kv_heads + head
    own_value = (GROUP + 1) * kv_heads + head
    if HEADS.grouped:
        first_query = head * (GROUP + 2)
        own_key = first_query + GROUP
        own_value = own_key + 1
    if HEADS.keys_as_values:
        of_row = (GROUP + 1) * kv_heads * DIM
        own_value = own_key
    projections = qkv_ptr + row * of_row
    q_heads = projections + (first_query + group)[:, None] * DIM
    q_inside = in_group[:, None] & in_head[None, :]
    k_heads = projections + own_key * DIM + (new - behind)[:, None] * of_row
    v_heads = projections + own_value * DIM + (new - behind)[:, None] * of_row
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    # All loads first: they are under way together.
    q = tl.load(q_heads + d[None, :], mask=q_inside, other=0.0)
    q_partner = q
    k_new = tl.load(k_heads + d[None, :], mask=makes, other=0.0)
    k_partner = k_new
    if ROTATED > 0:
        q_partner = tl.load(q_heads + other[None, :], mask=q_inside, other=0.0)
        k_partner = tl.load(k_heads + other[None, :], mask=makes, other=0.0)
    v_new = tl.load(v_heads + d[None, :], mask=makes, other=0.0)
    if HEADS.clipped:
        q = _clamped(q, rare.clip)
        q_partner = _clamped(q_partner, rare.clip)
        k_new = _clamped(k_new, rare.clip)
        k_partner = _clamped(k_partner, rare.clip)
        v_new = _clamped(v_new, rare.clip)
    if HEADS.value_norms:
        wide = v_new.to(tl.float32)
        v_scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / DIM + eps)[:, None]
        v_new = normalised(wide, v_scale, v_norm[None, :], dtype, HEADS.plus_one).to(dtype)
    q_scale = 1.0
    k_scale = 1.0
    if HEADS.norms == ALL:
        count = heads * DIM
        q_scale = tl.rsqrt(_sum_of_squares(projections, count, HEADS.all_queries) / count + eps)
        count = kv_heads * DIM
        k_scale = tl.rsqrt(_sum_of_squares(projections + heads * DIM, count, HEADS.all_keys) / count + eps)
        if SPAN > 1:
            k_scales = tl.where(new == behind, k_scale, 0.0)
            for back in range(1, tl.where(last, behind + 1, 1)):
                of_keys = projections + heads * DIM - back * of_row
                other_scale = tl.rsqrt(_sum_of_squares(of_keys, count, HEADS.all_keys) / count + eps)
                k_scales = tl.where(new == behind - back, other_scale, k_scales)
            k_scale = k_scales[:, None]
    q = _rotated(q, q_partner, q_norm, q_partner_norm, q_bias, q_partner_bias, q_scale, cos, sin, eps, HEADS, dtype)
    k_new = _rotated(
        k_new, k_partner, k_norm, k_partner_norm, k_bias, k_partner_bias, k_scale, k_cos, k_sin, eps, HEADS, dtype
    )
    if HEADS.growing:
        q = (q.to(tl.float32) * (1.0 + more.growth * tl.log(1.0 + (position // more.every).to(tl.float32)))).to(dtype)

    if SPAN == 1:
        top = tl.sum(q.to(tl.float32) * k_new.to(tl.float32), axis=1) * scale
        if HEADS.capped:
            top = more.cap * tanh(top / more.cap)
        maximum = tl.where(last, top, float("-inf"))
        weight_sum = tl.zeros((PADDED_GROUP,), tl.float32) + tl.where(last, 1.0, 0.0)
        acc = tl.zeros((PADDED_GROUP, PADDED), tl.float32) + tl.where(last, v_new.to(tl.float32), 0.0)
    else:
        own_score = matmul(q, tl.trans(k_new), tl.zeros((PADDED_GROUP, NEW), tl.float32)) * scale
        if HEADS.capped:
            own_score = more.cap * tanh(own_score / more.cap)
        if HEADS.alibi:
            of_new_keys = tl.load(of_alibi + at_new[None, :], mask=in_group[:, None] & sees[None, :], other=0.0)
            own_score += of_new_keys - own_alibi[:, None]
        maximum = tl.max(tl.where(sees[None, :], own_score, float("-inf")), axis=1)
        own_share = tl.where(sees[None, :], tl.exp(own_score - maximum[:, None]), 0.0)
        weight_sum = tl.sum(own_share, axis=1)
        acc = matmul(own_share.to(dtype), v_new, tl.zeros((PADDED_GROUP, PADDED), tl.float32))
    if last:  # each row writes what is its own
        own_place = cache + at_new.to(tl.int64)[:, None] * DIM + d[None, :]
        own_row = makes & (new == behind)[:, None] if SPAN > 1 else makes
        tl.store(keys_ptr + own_place, k_new, mask=own_row)
        tl.store(values_ptr + own_place, v_new, mask=own_row)
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
        if HEADS.capped:
            score = more.cap * tanh(score / more.cap)
        if HEADS.alibi:
            at_keys = first + tl.arange(0, BLOCK)
            of_keys = tl.load(of_alibi + at_keys[None, :], mask=in_group[:, None] & inside[None, :], other=0.0)
            score += of_keys - own_alibi[:, None]
        score = tl.where(inside[None, :], score, float("-inf"))
        higher = tl.maximum(maximum, tl.max(score, axis=1))
        share = tl.exp(score - higher[:, None])
        shrink = tl.exp(maximum - higher)
        weight_sum = weight_sum * shrink + tl.sum(share, axis=1)
        acc = matmul(share.to(dtype), v, acc * shrink[:, None])
        maximum = higher
    if HEADS.sinks:  # they join the sum once: in the split of the new token
        sinks = tl.where(last, sinks, float("-inf"))
        higher = tl.maximum(maximum, sinks)
        shrink = tl.exp(maximum - higher)
        weight_sum = weight_sum * shrink + tl.exp(sinks - higher)
        acc *= shrink[:, None]
        maximum = higher

    average = acc / weight_sum[:, None]
    log = maximum * 1.4426950408889634 + tl.log2(weight_sum)
    if SPAN > 1:  # a split that ends where the span begins may see nothing
        average = tl.where(weight_sum[:, None] > 0.0, average, 0.0)
        log = tl.where(weight_sum > 0.0, log, float("-inf"))
    own = (split * tl.num_programs(2) + row) * heads + head * GROUP + group
    tl.store(sums_ptr + own[:, None] * DIM + d[None, :], average, mask=q_inside)
    tl.store(logs_ptr + own, log, mask=in_group)
