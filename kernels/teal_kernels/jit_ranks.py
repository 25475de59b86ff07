"""The kernels of `teal_kernels.triton_ranks`, where they are explained. Triton's language, so not type-checked."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from teal_kernels import launching
from teal_kernels.jit_common import look, missing, rounded, send

EMPTY = tl.constexpr(launching.EMPTY)


@triton.jit
def _received(bits, at, inside, most_looks, TRAPS: tl.constexpr):
    """The float32 values that another rank sends to these places, which are empty for the next token then.

    After `most_looks` the kernel ends with an error, and with it the process: a rank that has died sends nothing.
    """
    looks = 0
    while missing(bits) & (looks < most_looks):
        bits = look(at, inside)
        looks += 1
    if TRAPS:
        if looks == most_looks:
            tl.inline_asm_elementwise("trap; // dummy $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    tl.store(at, EMPTY, mask=inside)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def sum_ranks_kernel(
    own_ptr,
    inboxes,
    y_ptr,
    squares_ptr,
    size,
    base,
    scale,
    most_looks,
    ROWS: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
    ADDED: tl.constexpr,
    SCALED: tl.constexpr,
    SQUARES: tl.constexpr,
    SUMS: tl.constexpr,
    TRAPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One block of one row: send it to all others, take theirs, add them up in the order of ranks."""
    row = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    at = row * size + columns
    dtype = y_ptr.dtype.element_ty
    if PDL:
        gdc_wait()
    own = tl.load(own_ptr + at, mask=inside, other=0.0).to(tl.float32)
    for peer in tl.static_range(RANKS):
        if peer != RANK:
            send(inboxes[peer] + base + RANK * ROWS * size + at, own, inside)
    if PDL:
        gdc_launch_dependents()
    if ADDED:
        before = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for source in tl.static_range(RANKS):
        if source == RANK:
            total += own
        else:
            from_source = inboxes[RANK] + base + source * ROWS * size + at
            total += _received(look(from_source, inside), from_source, inside, most_looks, TRAPS)
    y = rounded(total, dtype)
    if ADDED:
        if SCALED:
            y = rounded(y * scale, dtype)
        y = rounded(before + y, dtype)
    y = tl.where(inside, y, 0.0)
    if SQUARES:
        of_block = squares_ptr + row * tl.num_programs(0) + tl.program_id(0)
        tl.store(of_block, tl.sum(y * y, axis=0))
        if SUMS:
            tl.store(of_block + ROWS * tl.num_programs(0), tl.sum(y, axis=0))
    tl.store(y_ptr + at, y.to(dtype), mask=inside)


@triton.jit
def gather_ranks_kernel(
    own_ptr,
    inboxes,
    y_ptr,
    width,
    size,
    base,
    most_looks,
    ROWS: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
    TRAPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One block of each rank's columns of one row: send the own ones, take the others', write all side by side."""
    row = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    at = row * width + columns
    if PDL:
        gdc_wait()
    own = tl.load(own_ptr + at, mask=inside, other=0.0).to(tl.float32)
    for peer in tl.static_range(RANKS):
        if peer != RANK:
            send(inboxes[peer] + base + RANK * ROWS * width + at, own, inside)
    if PDL:
        gdc_launch_dependents()
    for source in tl.static_range(RANKS):
        found = own
        if source != RANK:
            from_source = inboxes[RANK] + base + source * ROWS * width + at
            found = _received(look(from_source, inside), from_source, inside, most_looks, TRAPS)
        outs = source * width + columns
        tl.store(y_ptr + row * size + outs, found.to(y_ptr.dtype.element_ty), mask=inside & (outs < size))
