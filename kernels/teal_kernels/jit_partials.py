"""Attention's split-KV partials, which the product after it merges. Triton's language, so not type-checked."""

import triton
import triton.language as tl

from teal_kernels import launching
from teal_kernels.jit_common import lanes_inside

_FIRST_PARTIALS = tl.constexpr(launching.FIRST_PARTIALS)
# Partials that a step of the loop over more takes: at most so many, and at most so many of all rows together. Loads of
# few suffice to keep memory busy, while the time that Triton's coalescing takes to compile grows with the cube of
# them: 27 s for six partials of eight rows, 5 s for one.
_MORE_PARTIALS = tl.constexpr(6)
_MORE_PARTIALS_OF_ROWS = tl.constexpr(12)


@triton.jit
def split_of_cache(position, window, SPLITS: tl.constexpr, MULTIPLE: tl.constexpr):
    """How attention splits the KV cache for a token at `position`; for several rows the longest row's says it for all.

    Returns:
        The first position that is seen, positions of a split, splits.
    """
    lowest = 0
    if window > 0:
        lowest = tl.maximum(position + 1 - window, 0)
    length = position + 1 - lowest
    split = tl.cdiv(tl.cdiv(length, SPLITS), MULTIPLE) * MULTIPLE
    return lowest, split, tl.cdiv(length, split)


@triton.jit
def _merge(
    tops,
    totals,
    merged,
    partials,
    used,
    first,
    n_in,
    begin,
    stop,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """Partials `first` and on, `COUNT` of them or as many as are `used`, added to those before.

    For each head and row the highest logarithm yet and the sum of the shares, for each vector of inputs and row
    the sum of the values.
    """
    LANES: tl.constexpr = INPUTS.lanes
    HEAD_SIZE: tl.constexpr = INPUTS.head_size
    VECTORS: tl.constexpr = INPUTS.vectors
    PER_HEAD: tl.constexpr = INPUTS.vectors_per_head
    lane = tl.arange(0, LANES)
    heads = n_in // HEAD_SIZE
    logs = ()  # all loads first
    sums = ()
    for step in tl.static_range(COUNT):
        which = tl.full((LANES,), first + step, tl.int32)
        for row in tl.static_range(ROWS):
            of_row = (first + step) * ROWS + row
            sums_at = partials.sums + of_row * n_in + begin + lane
            for vector in tl.static_range(VECTORS):
                inside = lanes_inside(begin, stop, vector, LANES, INPUTS.full)
                there = inside & (which < used)
                if vector % PER_HEAD == 0:
                    at = partials.logs + of_row * heads + (begin + vector * LANES + lane) // HEAD_SIZE
                    logs = logs + (tl.load(at, mask=there, other=tl.where(inside, float("-inf"), 0.0)),)
                sums = sums + (tl.load(sums_at + vector * LANES, mask=there, other=0.0),)
    of_heads: tl.constexpr = (VECTORS + PER_HEAD - 1) // PER_HEAD
    higher = ()
    new_totals = ()
    shrinks = ()
    shares = ()
    for row in tl.static_range(ROWS):
        for head in tl.static_range(of_heads):
            before = tops[row * of_heads + head]
            top = before
            for step in tl.static_range(COUNT):
                top = tl.maximum(top, logs[(step * ROWS + row) * of_heads + head])
            shrink = tl.exp2(before - top)
            total = totals[row * of_heads + head] * shrink
            for step in tl.static_range(COUNT):
                share = tl.exp2(logs[(step * ROWS + row) * of_heads + head] - top)
                shares = shares + (share,)
                total += share
            higher = higher + (top,)
            shrinks = shrinks + (shrink,)
            new_totals = new_totals + (total,)
    added = ()
    for vector in tl.static_range(VECTORS):
        for row in tl.static_range(ROWS):
            value = merged[vector * ROWS + row] * shrinks[row * of_heads + vector // PER_HEAD]
            for step in tl.static_range(COUNT):
                share = shares[(row * of_heads + vector // PER_HEAD) * COUNT + step]
                value += share * sums[(step * ROWS + row) * VECTORS + vector]
            added = added + (value,)
    return higher, new_totals, added


@triton.jit
def merged_partials(partials, used, n_in, begin, stop, ROWS: tl.constexpr, INPUTS: tl.constexpr):
    """Inputs that are split-KV partials, merged: for each vector of inputs and row (lanes,) float32.

    `used` is the number of partials that the longest row has. Those that a shorter row has not weigh nothing: attention
    wrote them so. With a number for each row, or a bound from all rows' positions, a token of four rows took 7 or 5 %
    longer (Llama-3-8B, H200).
    """
    SPLITS: tl.constexpr = INPUTS.splits
    LANES: tl.constexpr = INPUTS.lanes
    VECTORS: tl.constexpr = INPUTS.vectors
    PER_HEAD: tl.constexpr = INPUTS.vectors_per_head
    at_first: tl.constexpr = _FIRST_PARTIALS if SPLITS > _FIRST_PARTIALS else SPLITS
    tops = ()
    totals = ()
    merged = ()
    for _ in tl.static_range((VECTORS + PER_HEAD - 1) // PER_HEAD * ROWS):
        tops = tops + (tl.full((LANES,), float("-inf"), tl.float32),)
        totals = totals + (tl.zeros((LANES,), tl.float32),)
    for _ in tl.static_range(VECTORS * ROWS):
        merged = merged + (tl.zeros((LANES,), tl.float32),)
    tops, totals, merged = _merge(tops, totals, merged, partials, used, 0, n_in, begin, stop, at_first, ROWS, INPUTS)
    if at_first < SPLITS:
        share: tl.constexpr = _MORE_PARTIALS_OF_ROWS // ROWS
        more: tl.constexpr = _MORE_PARTIALS if share > _MORE_PARTIALS else share
        for first in range(at_first, used, more):
            tops, totals, merged = _merge(
                tops, totals, merged, partials, used, first, n_in, begin, stop, more, ROWS, INPUTS
            )
    of_heads: tl.constexpr = (VECTORS + PER_HEAD - 1) // PER_HEAD
    inverses = ()
    for each in tl.static_range(of_heads * ROWS):
        inverses = inverses + (1.0 / totals[each],)
    divided = ()
    for vector in tl.static_range(VECTORS):
        for row in tl.static_range(ROWS):
            divided = divided + (merged[vector * ROWS + row] * inverses[row * of_heads + vector // PER_HEAD],)
    return divided
