"""The kernel of `teal_kernels.triton_gemv`, where it is explained. Triton's language, so not type-checked."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from teal_kernels.jit_common import (
    LEAST_TILE,
    by_elements,
    look,
    received,
    received_both,
    rms_scale,
    rms_scales,
    rounded,
    send,
)
from teal_kernels.jit_heads import head_stretches
from teal_kernels.jit_lists import begin_list, end_list, norm_weights, take_inputs
from teal_kernels.jit_sums import group_factors, load_rows, no_sums, scaled_sums, sum_rows

PLAIN = tl.constexpr(0)
RESIDUAL = tl.constexpr(1)
GATED = tl.constexpr(2)


@triton.jit
def gemv_kernel(
    x_ptr,
    norm_ptr,
    squares_ptr,
    heads_ptr,
    logs_ptr,
    positions_ptr,
    weight_ptr,
    scale_ptr,
    zero_ptr,
    threshold_ptr,
    bias_ptr,
    y_ptr,
    squares_out_ptr,
    partial_ptr,
    scratch_ptr,
    counts_ptr,
    n_in,
    stride,
    part_0,
    part_1,
    part_2,
    inputs_per_chunk,
    n_splits,
    group,
    n_squares,
    eps,
    window,
    BITS: tl.constexpr,
    ZEROS: tl.constexpr,
    SEVERAL_GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    BATCH: tl.constexpr,
    LISTED: tl.constexpr,
    NORM: tl.constexpr,
    NORM_OF_TILES: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_SPLITS: tl.constexpr,
    HEAD_SHORTEST: tl.constexpr,
    ALIKE: tl.constexpr,
    EPILOGUE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    FULL: tl.constexpr,
    SQUARES: tl.constexpr,
    SPLIT: tl.constexpr,
    LINES: tl.constexpr,
    FINISHERS: tl.constexpr,
    STRETCH: tl.constexpr,
    SLOTS: tl.constexpr,
    SHARED: tl.constexpr,
    LANES: tl.constexpr,
    INPUT_LINES: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    UNROLL: tl.constexpr,
    WARPS: tl.constexpr,
    EVICT: tl.constexpr,
    PDL: tl.constexpr,
):
    """x (ROWS, in), weights input-major (in, out), partial sums (splits, ROWS, blocks) float32; see `triton_gemv.gemv`.

    Quantised weights (BITS below 16) are PACK to a 32-bit word. A program works through a block of
    WORDS words; of its sums first come those of the lowest weight of every word, and so on.
    """
    PACK: tl.constexpr = 32 // BITS if BITS < 16 else 1
    WORDS: tl.constexpr = BLOCK_OUT // PACK
    block = tl.program_id(0)
    split = tl.program_id(1)
    # Which part, which outputs. Blocks never straddle two parts: each has one threshold.
    blocks_0 = tl.cdiv(part_0, BLOCK_OUT)
    blocks_1 = tl.cdiv(part_1, BLOCK_OUT)
    total = part_0 + part_1 + part_2
    part = (block >= blocks_0).to(tl.int32) + (block >= blocks_0 + blocks_1).to(tl.int32)
    out_start = block * BLOCK_OUT
    out_stop = total
    word_start = block * WORDS
    if not EVEN:
        blocks_before = tl.where(part == 0, 0, tl.where(part == 1, blocks_0, blocks_0 + blocks_1))
        part_start = tl.where(part == 0, 0, tl.where(part == 1, part_0, part_0 + part_1))
        out_start = part_start + (block - blocks_before) * BLOCK_OUT
        out_stop = part_start + tl.where(part == 0, part_0, tl.where(part == 1, part_1, part_2))
        words_0 = tl.cdiv(part_0, PACK)
        words_before = tl.where(part == 0, 0, tl.where(part == 1, words_0, words_0 + tl.cdiv(part_1, PACK)))
        word_start = words_before + (block - blocks_before) * WORDS
    words = tl.arange(0, WORDS)
    inside = out_start + words * PACK < out_stop
    if EVEN:
        inside = tl.full((WORDS,), True, tl.int1)
    first = split * inputs_per_chunk
    last = tl.minimum(first + inputs_per_chunk, n_in)
    threshold = 0.0
    if LISTED:
        threshold = tl.load(threshold_ptr + part)
    columns = weight_ptr + first.to(tl.int64) * stride + word_start + words
    entries = scratch_ptr + (block * n_splits + split) * ROWS * STRETCH
    taken: tl.constexpr = NORM or HEAD_SIZE > 0
    if LISTED or taken:
        entries = begin_list(entries, SHARED)
    partial_counts = ()
    if HEAD_SIZE > 0:  # positions were written long before the kernel that this one follows
        for of_row in tl.static_range(ROWS):
            _, _, used = head_stretches(tl.load(positions_ptr + of_row), window, HEAD_SPLITS, HEAD_SHORTEST)
            partial_counts = partial_counts + (used,)
    weights = ()
    if NORM and AT_ONCE:
        weights = norm_weights(norm_ptr, first, last, LANES, INPUT_LINES, FULL)
    # What is read whole is known before the inputs are. (For matrix units Triton sees to rows under way.)
    elementwise: tl.constexpr = by_elements(ROWS, BITS)
    summed: tl.constexpr = elementwise and BITS < 16  # inputs as they are taken; matrix units sum those of their tiles
    one_loop: tl.constexpr = elementwise and not SEVERAL_GROUPS  # over rows, and not one that Triton pipelines
    whole: tl.constexpr = not LISTED and one_loop
    # Attention or the choice of the best token, which come after, have too few programs to crowd: `launch_dependents`.
    early: tl.constexpr = PDL and one_loop and EPILOGUE == PLAIN
    ahead = ()
    if whole:
        ahead = load_rows(columns, inside, (), 0, last - first, stride, LISTED, BLOCK_IN, UNROLL, EVICT)
    if PDL:
        gdc_wait()

    dtype = x_ptr.dtype.element_ty
    scales = ()
    if NORM_OF_TILES:
        scales = rms_scales(squares_ptr, n_squares, n_in, eps, SQUARES, ROWS)
    elif NORM:
        for row in tl.static_range(ROWS):
            scales = scales + (rms_scale(squares_ptr + row * n_squares, n_squares, n_in, eps, SQUARES),)
    active = 0
    acc = no_sums(PACK, WORDS, ROWS, BITS, BLOCK_IN)
    pieces = tl.cdiv(last - first, group) if SEVERAL_GROUPS else 1
    for nth in range(pieces):
        begin = first
        stop = last
        if SEVERAL_GROUPS:
            begin = first + nth * group
            stop = tl.minimum(begin + group, last)
        if BITS < 16:
            line = (begin // group).to(tl.int64) * total
            factors, zeros = group_factors(
                scale_ptr, zero_ptr, line, out_start + words * PACK, out_stop, ZEROS, BITS, PACK, WORDS
            )
        if SEVERAL_GROUPS and (LISTED or taken):
            # Or entries would be stored where a warp of the piece before still reads ahead, if for nothing.
            tl.debug_barrier()
        count = 0
        totals = ()
        if LISTED or taken or summed:
            count, kept, totals = take_inputs(
                x_ptr,
                heads_ptr,
                logs_ptr,
                partial_counts,
                norm_ptr,
                weights,
                scales,
                entries,
                n_in,
                first,
                begin,
                stop,
                threshold,
                LISTED,
                NORM,
                HEAD_SIZE,
                HEAD_SPLITS,
                ALIKE,
                summed,
                ROWS,
                SLOTS,
                SHARED,
                LANES,
                INPUT_LINES,
                AT_ONCE,
                FULL,
                WARPS,
            )
            active += kept
        listed = entries
        if LISTED or taken:
            listed = end_list(entries, SHARED)
        if not LISTED:
            count = stop - begin
        if early:
            gdc_launch_dependents()
        sums, x_sums_of_tiles = sum_rows(
            columns,
            inside,
            ahead,
            x_ptr + first,
            norm_ptr + first,
            scales,
            n_in,
            listed,
            begin - first,
            begin - first + count,
            stride,
            dtype,
            LISTED,
            taken,
            NORM_OF_TILES,
            whole,
            BITS,
            PACK,
            WORDS,
            ROWS,
            SLOTS,
            SHARED,
            BLOCK_IN,
            UNROLL,
            EVICT,
            PDL and LISTED and one_loop and not early,
        )
        if BITS >= 16:
            acc = sums
        else:
            x_sums = ()
            if summed:
                for of_row in tl.static_range(ROWS):
                    x_sums = x_sums + (totals[of_row] / BLOCK_IN,)
            else:
                x_sums = (x_sums_of_tiles[:, None],)
            acc = scaled_sums(acc, sums, x_sums, factors, zeros, dtype, BITS, PACK, ROWS)
    if PDL and not early:
        gdc_launch_dependents()  # of an empty list, or where the loop did not: see `launch_dependents`
    if LISTED:
        if (block == 0) | (block == blocks_0) | (block == blocks_0 + blocks_1):
            tl.atomic_add(counts_ptr + part, active.to(tl.int64), sem="relaxed")

    # The stretches' sums meet in memory. The last programs of a block finish a slice of it each,
    # for all rows side by side; with a gated table those of its second half do.
    meet: tl.constexpr = SPLIT or EPILOGUE == GATED or ROWS > 1 or PACK > 1
    piece = 0
    width: tl.constexpr = BLOCK_OUT // FINISHERS
    line_length = tl.num_programs(0) * BLOCK_OUT
    if meet:
        rows = tl.arange(0, LEAST_TILE)
        for k in tl.static_range(PACK):
            places = block * BLOCK_OUT + k * WORDS + words
            inside = out_start + words * PACK + k < out_stop
            if EVEN:
                inside = tl.full((WORDS,), True, tl.int1)
            if elementwise:
                for of_row in tl.static_range(ROWS):
                    mine = partial_ptr + (split * ROWS + of_row) * line_length
                    send(mine + places, tl.sum(acc[k * ROWS + of_row], axis=0), inside)
            else:
                mine = partial_ptr + (split * ROWS + rows)[:, None] * line_length
                send(mine + places[None, :], acc[k], (rows < ROWS)[:, None] & inside[None, :])
        piece = split - (n_splits - FINISHERS)
        if EPILOGUE == GATED:
            piece = tl.where(block >= blocks_0, piece, -1)
        if piece < 0:
            return
    columns_here = tl.arange(0, BATCH * width)
    row = 0
    place = piece * width + columns_here % width
    outs = out_start + place
    if PACK > 1:  # not place % WORDS * PACK + place // WORDS: with that, triton 3.6 computes wrong addresses
        outs = out_start + place * PACK % BLOCK_OUT + place * PACK // BLOCK_OUT
    inside = outs < out_stop
    if EVEN:
        inside = tl.full((BATCH * width,), True, tl.int1)
    if ROWS > 1:
        row = columns_here // width
        inside = (outs < out_stop) & (row < ROWS)
    at = outs
    line_place = block * BLOCK_OUT + place
    gate_place = line_place
    if EPILOGUE == GATED:
        at = outs - part_0
        gate_place = line_place - blocks_0 * BLOCK_OUT
    if EPILOGUE == RESIDUAL:  # travels while the sums are gathered
        residual = tl.load(y_ptr + row * total + outs, mask=inside, other=0.0)
    if meet:  # in a fixed order, a few lines at a time
        y = tl.zeros((BATCH * width,), dtype=tl.float32)
        up = y
        for first_line in range(0, n_splits, LINES):
            lines = first_line + tl.arange(0, LINES)
            there = (lines < n_splits)[:, None] & inside[None, :]
            line = partial_ptr + (lines * ROWS)[:, None] * line_length
            gate_at = line + (row * line_length + gate_place)[None, :]
            bits = look(gate_at, there)
            if EPILOGUE == GATED:
                up_at = line + (row * line_length + line_place)[None, :]
                gate_sums, up_sums = received_both(bits, gate_at, look(up_at, there), up_at, there)
                y += tl.sum(gate_sums, axis=0)
                up += tl.sum(up_sums, axis=0)
            else:
                y += tl.sum(received(bits, gate_at, there), axis=0)
    else:
        y = tl.sum(acc[0], axis=0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + at, mask=inside, other=0.0).to(tl.float32)
    y = y.to(dtype)
    if EPILOGUE == GATED:
        if HAS_BIAS:
            up += tl.load(bias_ptr + outs, mask=inside, other=0.0).to(tl.float32)
        gate = y.to(tl.float32)
        y = (rounded(gate * tl.sigmoid(gate), dtype) * rounded(up, dtype)).to(dtype)
        tl.store(y_ptr + row * part_0 + at, y, mask=inside)
    else:
        if EPILOGUE == RESIDUAL:
            y = (residual.to(tl.float32) + y.to(tl.float32)).to(dtype)
            square = tl.where(inside, y.to(tl.float32) * y.to(tl.float32), 0.0)
            each = tl.arange(0, BATCH)
            tl.store(
                squares_out_ptr + (each * tl.num_programs(0) + block) * FINISHERS + piece,
                tl.sum(tl.reshape(square, (BATCH, width)), axis=1),
                mask=each < ROWS,
            )
        tl.store(y_ptr + row * total + outs, y, mask=inside)
