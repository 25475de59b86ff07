"""The kernel of `teal_kernels.triton_gemv`, where it is explained. Triton's language, so not type-checked."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from teal_kernels.jit_common import LEAST_TILE, head_stretches, look, matmul, received, rms_scale, rounded, send
from teal_kernels.jit_lists import begin_list, end_list, listed_index, listed_value, norm_weights, take_inputs

PLAIN = tl.constexpr(0)
RESIDUAL = tl.constexpr(1)
GATED = tl.constexpr(2)


@triton.jit
def _unpacked(words, k: tl.constexpr, dtype: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr):
    """The k-th weight of each word, as what is multiplied; of quantised weights their codes.

    For one row a code u is put below the leading bit of a float32: 1 + u / 2**BITS, which takes two
    instructions where a conversion takes three (`_corrected` takes it back). For several rows u itself.
    """
    if BITS >= 16:
        value = words
        if ROWS == 1:
            value = words.to(tl.float32)
    else:
        code = (words >> (k * BITS)) & ((1 << BITS) - 1)
        if ROWS == 1:
            value = (code << (23 - BITS) | 0x3F800000).to(tl.float32, bitcast=True)
        else:
            value = code.to(tl.float32).to(dtype)
    return value


@triton.jit
def _corrected(factor, zero, BITS: tl.constexpr, ROWS: tl.constexpr):
    """Scale and zero point of codes, for the values of `_unpacked`."""
    if ROWS == 1:
        factor = factor * (1 << BITS)
        zero = 1.0 + zero / (1 << BITS)
    return factor, zero


@triton.jit
def _no_sums(PACK: tl.constexpr, WORDS: tl.constexpr, ROWS: tl.constexpr, BLOCK_IN: tl.constexpr):
    """For each weight of a word a tile of zeros, float32."""
    acc = ()
    for _ in tl.static_range(PACK):
        acc = acc + (tl.zeros((BLOCK_IN if ROWS == 1 else LEAST_TILE, WORDS), dtype=tl.float32),)
    return acc


@triton.jit
def _added(acc, values, words, dtype: tl.constexpr, BITS: tl.constexpr, PACK: tl.constexpr, ROWS: tl.constexpr):
    """The sums, and values times a tile of weights.

    One row is multiplied element by element, and its tile added up at the end: 16 instructions for 16
    bytes of weights. More rows are what matrix units are for.
    """
    added = ()
    for k in tl.static_range(PACK):
        weights = _unpacked(words, k, dtype, BITS, ROWS)
        added = added + (acc[k] + values * weights if ROWS == 1 else matmul(values, weights, acc[k]),)
    return added


@triton.jit
def _sum_rows(
    columns,
    inside,
    x_ptr,
    n_in,
    entries,
    begin,
    stop,
    stride,
    dtype: tl.constexpr,
    LISTED: tl.constexpr,
    TAKEN: tl.constexpr,
    BITS: tl.constexpr,
    PACK: tl.constexpr,
    WORDS: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    UNROLL: tl.constexpr,
    EVICT: tl.constexpr,
):
    """Inputs times their rows of weights: for each weight of a word a tile of sums.

    Those of slots `begin` to `stop` of the list, or without one inputs `begin` to `stop`, of which `columns` and
    `x_ptr` are the first, or of which the values were TAKEN to their slots.
    """
    rows = tl.arange(0, LEAST_TILE)
    in_rows = rows < ROWS
    tile = tl.arange(0, BLOCK_IN)
    acc = _no_sums(PACK, WORDS, ROWS, BLOCK_IN)
    which = ()
    for step in tl.static_range(UNROLL):
        slots = begin + step * BLOCK_IN + tile
        if LISTED:
            slots = listed_index(entries, slots, slots < stop, dtype, SHARED)
        which = which + (slots,)
    for start in range(begin, stop, BLOCK_IN * UNROLL):
        weights = ()
        for step in tl.static_range(UNROLL):
            there = start + step * BLOCK_IN + tile < stop
            weights = weights + (
                tl.load(
                    columns[None, :] + (which[step] * stride)[:, None],
                    mask=there[:, None] & inside[None, :],
                    other=0,
                    eviction_policy=EVICT,
                ),
            )
        following = ()  # the next indices travel while these weights do
        for step in tl.static_range(UNROLL):
            slots = start + (UNROLL + step) * BLOCK_IN + tile
            if LISTED:
                slots = listed_index(entries, slots, slots < stop, dtype, SHARED)
            following = following + (slots,)
        which = following
        for step in tl.static_range(UNROLL):
            slots = start + step * BLOCK_IN + tile
            if ROWS == 1:
                if LISTED or TAKEN:
                    values = listed_value(entries, slots, slots < stop, dtype, SHARED)[:, None]
                else:
                    values = tl.load(x_ptr + slots, mask=slots < stop, other=0.0).to(tl.float32)[:, None]
            else:
                there = in_rows[:, None] & (slots < stop)[None, :]
                if LISTED or TAKEN:
                    of_rows = tl.where(in_rows, rows, 0)[:, None] * SLOTS + slots[None, :]
                    values = listed_value(entries, of_rows, there, dtype, SHARED).to(dtype)
                else:
                    values = tl.load(x_ptr + rows[:, None] * n_in + slots[None, :], mask=there, other=0.0)
            acc = _added(acc, values, weights[step], dtype, BITS, PACK, ROWS)
    return acc


@triton.jit
def _sum_piece(
    columns,
    inside,
    x_ptr,
    heads_ptr,
    logs_ptr,
    lines_of_heads,
    norm_ptr,
    weights,
    scales,
    entries,
    n_in,
    first,
    begin,
    stop,
    threshold,
    stride,
    LISTED: tl.constexpr,
    NORM: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ALIKE: tl.constexpr,
    BITS: tl.constexpr,
    PACK: tl.constexpr,
    WORDS: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    SHARED: tl.constexpr,
    LANES: tl.constexpr,
    TAKEN: tl.constexpr,
    AT_ONCE: tl.constexpr,
    FULL: tl.constexpr,
    SEVERAL_GROUPS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    UNROLL: tl.constexpr,
    EVICT: tl.constexpr,
):
    """Inputs `begin` to `stop` times their rows of weights: tiles of sums, and what `take_inputs` says."""
    dtype = x_ptr.dtype.element_ty
    taken: tl.constexpr = NORM or HEAD_SIZE > 0
    if SEVERAL_GROUPS and LISTED:  # no entry may be stored while a warp still reads ahead of the piece before
        tl.debug_barrier()
    count = 0
    active = 0
    totals = ()
    if LISTED or taken or BITS < 16:
        count, active, totals = take_inputs(
            x_ptr,
            heads_ptr,
            logs_ptr,
            lines_of_heads,
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
            ALIKE,
            BITS < 16,
            ROWS,
            SLOTS,
            SHARED,
            LANES,
            TAKEN,
            AT_ONCE,
            FULL,
        )
    if LISTED or taken:
        entries = end_list(entries, SHARED)
    if not LISTED:
        count = stop - begin
    acc = _sum_rows(
        columns,
        inside,
        x_ptr + first,
        n_in,
        entries,
        begin - first,
        begin - first + count,
        stride,
        dtype,
        LISTED,
        taken,
        BITS,
        PACK,
        WORDS,
        ROWS,
        SLOTS,
        SHARED,
        BLOCK_IN,
        UNROLL,
        EVICT,
    )
    return acc, active, totals


@triton.jit
def gemv_kernel(
    x_ptr,
    norm_ptr,
    squares_ptr,
    heads_ptr,
    logs_ptr,
    position_ptr,
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
    inputs_per_split,
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
    HEAD_SIZE: tl.constexpr,
    HEAD_SPLITS: tl.constexpr,
    HEAD_SHORTEST: tl.constexpr,
    ALIKE: tl.constexpr,
    FINISH: tl.constexpr,
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
    TAKEN: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    UNROLL: tl.constexpr,
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
    first = split * inputs_per_split
    last = tl.minimum(first + inputs_per_split, n_in)
    threshold = 0.0
    if LISTED:
        threshold = tl.load(threshold_ptr + part)
    columns = weight_ptr + first.to(tl.int64) * stride + word_start + words
    entries = scratch_ptr + (block * n_splits + split) * ROWS * STRETCH
    if LISTED or NORM or HEAD_SIZE > 0:
        entries = begin_list(entries, SHARED)
    lines_of_heads = 0
    if HEAD_SIZE > 0:  # the position was written long before the kernel that this one follows
        _, _, lines_of_heads = head_stretches(tl.load(position_ptr), window, HEAD_SPLITS, HEAD_SHORTEST)
    weights = ()
    if NORM and AT_ONCE:
        weights = norm_weights(norm_ptr, first, last, LANES, TAKEN, FULL)
    if PDL:
        gdc_wait()
        # After the wait, so that whoever starts early may read what the kernel before this one wrote.
        gdc_launch_dependents()

    dtype = x_ptr.dtype.element_ty
    scales = ()
    if NORM:
        for row in tl.static_range(ROWS):
            scales = scales + (rms_scale(squares_ptr + row * n_squares, n_squares, n_in, eps, SQUARES),)
    if BITS >= 16:
        acc, active, _ = _sum_piece(
            columns,
            inside,
            x_ptr,
            heads_ptr,
            logs_ptr,
            lines_of_heads,
            norm_ptr,
            weights,
            scales,
            entries,
            n_in,
            first,
            first,
            last,
            threshold,
            stride,
            LISTED,
            NORM,
            HEAD_SIZE,
            ALIKE,
            BITS,
            PACK,
            WORDS,
            ROWS,
            SLOTS,
            SHARED,
            LANES,
            TAKEN,
            AT_ONCE,
            FULL,
            SEVERAL_GROUPS,
            BLOCK_IN,
            UNROLL,
            EVICT,
        )
    else:
        # sum of x (code - zero) scale = scale (sum of x code - zero sum of x), group by group of inputs.
        active = 0
        acc = _no_sums(PACK, WORDS, ROWS, BLOCK_IN)
        for begin in range(first, last, group if SEVERAL_GROUPS else STRETCH):
            stop = last
            if SEVERAL_GROUPS:
                stop = tl.minimum(begin + group, last)
            factors = ()
            zeros = ()
            line = (begin // group).to(tl.int64) * total + out_start + words * PACK
            for k in tl.static_range(PACK):
                outs_inside = out_start + words * PACK + k < out_stop
                factors = factors + (tl.load(scale_ptr + line + k, mask=outs_inside, other=0.0).to(tl.float32),)
                zero = tl.full((WORDS,), 1 << (BITS - 1), tl.float32)
                if ZEROS:
                    zero = tl.load(zero_ptr + line + k, mask=outs_inside, other=0).to(tl.float32)
                zeros = zeros + (zero,)
            sums, kept, totals = _sum_piece(
                columns,
                inside,
                x_ptr,
                heads_ptr,
                logs_ptr,
                lines_of_heads,
                norm_ptr,
                weights,
                scales,
                entries,
                n_in,
                first,
                begin,
                stop,
                threshold,
                stride,
                LISTED,
                NORM,
                HEAD_SIZE,
                ALIKE,
                BITS,
                PACK,
                WORDS,
                ROWS,
                SLOTS,
                SHARED,
                LANES,
                TAKEN,
                AT_ONCE,
                FULL,
                SEVERAL_GROUPS,
                BLOCK_IN,
                UNROLL,
                EVICT,
            )
            active += kept
            if ROWS == 1:  # shared among the rows of the tile, which are added up in the end
                x_sum = totals[0] / BLOCK_IN
            else:
                x_sum = tl.zeros((LEAST_TILE, 1), dtype=tl.float32)
                for row in tl.static_range(ROWS):
                    x_sum = tl.where((tl.arange(0, LEAST_TILE) == row)[:, None], totals[row], x_sum)
            scaled = ()
            for k in tl.static_range(PACK):
                factor, zero = _corrected(factors[k], zeros[k], BITS, ROWS)
                scaled = scaled + (acc[k] + factor[None, :] * (sums[k] - zero[None, :] * x_sum),)
            acc = scaled
    if LISTED:
        if (block == 0) | (block == blocks_0) | (block == blocks_0 + blocks_1):
            tl.atomic_add(counts_ptr + part, active.to(tl.int64), sem="relaxed")

    # The stretches' sums meet in memory. The last programs of a block finish a slice of it each,
    # for all rows side by side; with a gated table those of its second half do.
    meet: tl.constexpr = SPLIT or FINISH == GATED or ROWS > 1 or PACK > 1
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
            if ROWS == 1:
                send(partial_ptr + split.to(tl.int64) * line_length + places, tl.sum(acc[k], axis=0), inside)
            else:
                mine = partial_ptr + (split * ROWS + rows).to(tl.int64)[:, None] * line_length
                send(mine + places[None, :], acc[k], (rows < ROWS)[:, None] & inside[None, :])
        piece = split - (n_splits - FINISHERS)
        if FINISH == GATED:
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
    if FINISH == GATED:
        at = outs - part_0
        gate_place = line_place - blocks_0 * BLOCK_OUT
    if FINISH == RESIDUAL:  # travels while the sums are gathered
        residual = tl.load(y_ptr + row * total + outs, mask=inside, other=0.0)
    if meet:  # in a fixed order, a few lines at a time
        y = tl.zeros((BATCH * width,), dtype=tl.float32)
        up = y
        for first_line in range(0, n_splits, LINES):
            lines = first_line + tl.arange(0, LINES)
            there = (lines < n_splits)[:, None] & inside[None, :]
            line = partial_ptr + (lines * ROWS).to(tl.int64)[:, None] * line_length
            gate_at = line + (row * line_length + gate_place)[None, :]
            bits = look(gate_at, there)
            if FINISH == GATED:
                up_at = line + (row * line_length + line_place)[None, :]
                up_bits = look(up_at, there)
                up += tl.sum(received(up_bits, up_at, there), axis=0)
            y += tl.sum(received(bits, gate_at, there), axis=0)
    else:
        y = tl.sum(acc[0], axis=0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + at, mask=inside, other=0.0).to(tl.float32)
    y = y.to(dtype)
    if FINISH == GATED:
        if HAS_BIAS:
            up += tl.load(bias_ptr + outs, mask=inside, other=0.0).to(tl.float32)
        gate = y.to(tl.float32)
        y = (rounded(gate * tl.sigmoid(gate), dtype) * rounded(up, dtype)).to(dtype)
        tl.store(y_ptr + row * part_0 + at, y, mask=inside)
    else:
        if FINISH == RESIDUAL:
            y = (residual.to(tl.float32) + y.to(tl.float32)).to(dtype)
            square = tl.where(inside, y.to(tl.float32) * y.to(tl.float32), 0.0)
            each = tl.arange(0, BATCH)
            tl.store(
                squares_out_ptr + (each * tl.num_programs(0) + block) * FINISHERS + piece,
                tl.sum(tl.reshape(square, (BATCH, width)), axis=1),
                mask=each < ROWS,
            )
        tl.store(y_ptr + row * total + outs, y, mask=inside)
