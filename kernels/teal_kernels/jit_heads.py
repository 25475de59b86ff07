"""Attention's result, which the product after it merges. Triton's language, so not type-checked."""

import triton
import triton.language as tl

from teal_kernels import launching
from teal_kernels.jit_common import lanes_inside

_FIRST_LINES = tl.constexpr(launching.FIRST_LINES)
# Lines that a step of the loop over more takes: at most so many, and at most so many of all rows together. Loads of
# few suffice to keep memory busy, while the time that Triton's coalescing takes to compile grows with the cube of
# them: 27 s for six lines of eight rows, 5 s for one.
_MORE_LINES = tl.constexpr(6)
_MORE_LINES_OF_ROWS = tl.constexpr(12)


@triton.jit
def head_stretches(position, window, SPLITS: tl.constexpr, SHORTEST: tl.constexpr):
    """How attention cuts the cache for a token at `position`.

    Returns:
        The first position that is seen, positions of a stretch, stretches.
    """
    lowest = 0
    if window > 0:
        lowest = tl.maximum(position + 1 - window, 0)
    length = position + 1 - lowest
    stretch = tl.cdiv(tl.cdiv(length, SPLITS), SHORTEST) * SHORTEST
    return lowest, stretch, tl.cdiv(length, stretch)


@triton.jit
def _merge(
    tops,
    totals,
    merged,
    heads_ptr,
    logs_ptr,
    first,
    partial_counts,
    n_in,
    begin,
    stop,
    COUNT: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ALIKE: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    LINES: tl.constexpr,
    FULL: tl.constexpr,
):
    """Lines `first` and on of attention's heads, `COUNT` of them or as many as a row has, added to those before.

    What lies beyond a row's own number was written for no token of this step, or never: it is not read.

    For each head and row the highest logarithm yet and the sum of the shares, for each line of inputs and row the
    sum of the values.
    """
    lane = tl.arange(0, LANES)
    heads = n_in // HEAD_SIZE
    logs = ()  # all loads first
    sums = ()
    for step in tl.static_range(COUNT):
        line_of_heads = tl.full((LANES,), first + step, tl.int32)
        for row in tl.static_range(ROWS):
            of_row = (first + step) * ROWS + row
            sums_at = heads_ptr + of_row * n_in + begin + lane
            for line in tl.static_range(LINES):
                inside = lanes_inside(begin, stop, line, LANES, FULL)
                there = inside & (line_of_heads < partial_counts[row])
                if line % ALIKE == 0:
                    at = logs_ptr + of_row * heads + (begin + line * LANES + lane) // HEAD_SIZE
                    logs = logs + (tl.load(at, mask=there, other=tl.where(inside, float("-inf"), 0.0)),)
                sums = sums + (tl.load(sums_at + line * LANES, mask=there, other=0.0),)
    of_heads: tl.constexpr = (LINES + ALIKE - 1) // ALIKE
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
    for line in tl.static_range(LINES):
        for row in tl.static_range(ROWS):
            value = merged[line * ROWS + row] * shrinks[row * of_heads + line // ALIKE]
            for step in tl.static_range(COUNT):
                share = shares[(row * of_heads + line // ALIKE) * COUNT + step]
                value += share * sums[(step * ROWS + row) * LINES + line]
            added = added + (value,)
    return higher, new_totals, added


@triton.jit
def merged_heads(
    heads_ptr,
    logs_ptr,
    partial_counts,
    n_in,
    begin,
    stop,
    HEAD_SIZE: tl.constexpr,
    HEAD_SPLITS: tl.constexpr,
    ALIKE: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    LINES: tl.constexpr,
    FULL: tl.constexpr,
):
    """Lines of inputs that are heads of attention, merged: for each line and row (LANES,) float32.

    So many lines of inputs one after the other are ALIKE: they lie in one head. Rows are at positions of their own:
    each has as many lines of attention as `partial_counts` says, one at the least.
    """
    first_lines: tl.constexpr = _FIRST_LINES if HEAD_SPLITS > _FIRST_LINES else HEAD_SPLITS
    tops = ()
    totals = ()
    merged = ()
    for _ in tl.static_range((LINES + ALIKE - 1) // ALIKE * ROWS):
        tops = tops + (tl.full((LANES,), float("-inf"), tl.float32),)
        totals = totals + (tl.zeros((LANES,), tl.float32),)
    for _ in tl.static_range(LINES * ROWS):
        merged = merged + (tl.zeros((LANES,), tl.float32),)
    tops, totals, merged = _merge(
        tops,
        totals,
        merged,
        heads_ptr,
        logs_ptr,
        0,
        partial_counts,
        n_in,
        begin,
        stop,
        first_lines,
        HEAD_SIZE,
        ALIKE,
        ROWS,
        LANES,
        LINES,
        FULL,
    )
    if first_lines < HEAD_SPLITS:
        share: tl.constexpr = _MORE_LINES_OF_ROWS // ROWS
        more_lines: tl.constexpr = _MORE_LINES if share > _MORE_LINES else share
        most = partial_counts[0]
        for row in tl.static_range(1, ROWS):
            most = tl.maximum(most, partial_counts[row])
        for first in range(first_lines, most, more_lines):
            tops, totals, merged = _merge(
                tops,
                totals,
                merged,
                heads_ptr,
                logs_ptr,
                first,
                partial_counts,
                n_in,
                begin,
                stop,
                more_lines,
                HEAD_SIZE,
                ALIKE,
                ROWS,
                LANES,
                LINES,
                FULL,
            )
    of_heads: tl.constexpr = (LINES + ALIKE - 1) // ALIKE
    inverses = ()
    for each in tl.static_range(of_heads * ROWS):
        inverses = inverses + (1.0 / totals[each],)
    divided = ()
    for line in tl.static_range(LINES):
        for row in tl.static_range(ROWS):
            divided = divided + (merged[line * ROWS + row] * inverses[row * of_heads + line // ALIKE],)
    return divided
