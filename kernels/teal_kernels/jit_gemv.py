"""The kernel of `teal_kernels.triton_gemv`, where it is explained. Triton's language, so not type-checked."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from teal_kernels import launching
from teal_kernels.jit_common import (
    LEAST_TILE,
    activated,
    gated,
    keep_squares,
    keep_sums_beside,
    layer_scale,
    layer_scales,
    look,
    mean_of,
    received,
    received_both,
    rms_scale,
    rms_scales,
    rounded,
    scales_after_adding,
    send,
    xielu,
)
from teal_kernels.jit_lists import begin_list, end_list, no_biases, norm_weights, take_inputs
from teal_kernels.jit_partials import split_of_cache
from teal_kernels.jit_sums import (
    bias_of_words,
    columns_of_pairs,
    group_factors,
    load_rows,
    no_sums,
    scaled_sums,
    sum_rows,
)

PLAIN = tl.constexpr(0)
RESIDUAL = tl.constexpr(1)
GATED = tl.constexpr(2)
BESIDE = tl.constexpr(3)
PAIRED = tl.constexpr(4)
XIELU = tl.constexpr(launching.ACTIVATIONS["xielu"])


@triton.jit
def gemv_kernel(
    x_ptr,
    norm,
    added,
    partials,
    table,
    threshold_ptr,
    out,
    memory,
    experts,
    curve,
    sizes,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    INPUTS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    EXPERTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """x (ROWS, in), weights input-major (in, out), partial sums (chunks, ROWS, blocks) float32; see `triton_gemv.gemv`.

    Quantised weights are several to a 32-bit word. A program works through a block of words; of its sums first come
    those of the lowest weight of every word, and so on.

    Args:
        norm, added, ... sizes: as in `triton_gemv`; None where there is none.
        TILE, INPUTS, EPILOGUE, EXPERTS: as in `plan_gemv` and `experts`.
    """
    BLOCK_OUT: tl.constexpr = TILE.block_out
    PACK: tl.constexpr = TILE.pack
    WORDS: tl.constexpr = TILE.words
    BATCH: tl.constexpr = EPILOGUE.batch
    GATHERED: tl.constexpr = EPILOGUE.gathered
    place = tl.program_id(0)  # of its partial sums
    chunk = tl.program_id(1)
    block = place
    own_chunk = chunk
    row_of_x = 0
    row_of_y = 0
    rows_of_norm = ROWS
    if EXPERTS.chosen > 0:  # a table for each row of x; of what is added to the stream, those of one row make one y
        row_of_y = place // EXPERTS.blocks
        block = place % EXPERTS.blocks
        row_of_x = row_of_y
        if EPILOGUE.kind == RESIDUAL:
            row_of_x = row_of_y * EXPERTS.chosen + chunk // EXPERTS.chunks
            own_chunk = chunk % EXPERTS.chunks
        routed = row_of_x
        rows_of_norm = EXPERTS.tokens
        if EPILOGUE.kind != RESIDUAL:
            row_of_x = routed // EXPERTS.chosen
        x_ptr += row_of_x * sizes.n_in
    # Which part, which outputs. Blocks never straddle two parts: each has one threshold.
    part_0 = sizes.part_0
    part_1 = sizes.part_1
    part_2 = sizes.part_2
    blocks_0 = tl.cdiv(part_0, BLOCK_OUT)
    blocks_1 = tl.cdiv(part_1, BLOCK_OUT)
    total = part_0 + part_1 + part_2
    part = (block >= blocks_0).to(tl.int32) + (block >= blocks_0 + blocks_1).to(tl.int32)
    out_start = block * BLOCK_OUT
    out_stop = total
    word_start = block * WORDS
    if not EPILOGUE.even:
        blocks_before = tl.where(part == 0, 0, tl.where(part == 1, blocks_0, blocks_0 + blocks_1))
        part_start = tl.where(part == 0, 0, tl.where(part == 1, part_0, part_0 + part_1))
        out_start = part_start + (block - blocks_before) * BLOCK_OUT
        out_stop = part_start + tl.where(part == 0, part_0, tl.where(part == 1, part_1, part_2))
        words_0 = tl.cdiv(part_0, PACK)
        words_before = tl.where(part == 0, 0, tl.where(part == 1, words_0, words_0 + tl.cdiv(part_1, PACK)))
        word_start = words_before + (block - blocks_before) * WORDS
    words = tl.arange(0, WORDS)
    inside = out_start + words * PACK < out_stop
    if EPILOGUE.even:
        inside = tl.full((WORDS,), True, tl.int1)
    first = own_chunk * sizes.inputs_per_chunk
    last = tl.minimum(first + sizes.inputs_per_chunk, sizes.n_in)
    thresholds = ()
    if INPUTS.own_thresholds:
        of_part = threshold_ptr + part
        if EXPERTS.chosen > 0:
            of_part += routed // EXPERTS.chosen * sizes.n_parts
        for of_row in tl.static_range(ROWS):
            thresholds = thresholds + (tl.load(of_part + of_row * sizes.n_parts),)
    elif INPUTS.listed:
        threshold = tl.load(threshold_ptr + part)
        for _ in tl.static_range(ROWS):
            thresholds = thresholds + (threshold,)
    columns = table.weights + first.to(tl.int64) * sizes.stride + word_start + words
    entries = memory.lists + (place * sizes.n_chunks + chunk) * ROWS * INPUTS.capacity
    if INPUTS.taken:
        entries = begin_list(entries, INPUTS.shared_bytes)
    used = 0
    if INPUTS.head_size > 0:  # positions were written long before the kernel that this one follows
        _, _, used = split_of_cache(tl.load(partials.longest), sizes.window, INPUTS.splits, INPUTS.split_multiple)
    weights = ()
    biases = ()
    if INPUTS.norm and INPUTS.at_once:
        weights = norm_weights(norm.weight, first, last, INPUTS)
        if INPUTS.norm_centred:
            biases = norm_weights(norm.bias, first, last, INPUTS) if norm.bias is not None else no_biases(INPUTS)
    added_weights = ()
    if INPUTS.added and INPUTS.at_once:
        added_weights = norm_weights(added.weight, first, last, INPUTS)
    # What is read whole is known before the inputs are. (For tensor cores Triton sees to rows under way.)
    summed: tl.constexpr = (
        TILE.fma and TILE.bits < 16
    )  # inputs as they are taken; tensor cores sum those of their tiles
    one_loop: tl.constexpr = TILE.fma and not INPUTS.several_groups  # over rows, and not one that Triton pipelines
    whole: tl.constexpr = not INPUTS.listed and one_loop
    # Attention or the choice of the best token, which come after, have too few programs to crowd: `launch_dependents`.
    early: tl.constexpr = PDL and one_loop and EPILOGUE.kind == PLAIN
    ahead = ()
    if whole and EXPERTS.chosen == 0:
        ahead = load_rows(columns, inside, (), 0, last - first, sizes.stride, INPUTS.listed, TILE)
    if PDL:
        gdc_wait()
    share = 1.0
    expert_bias = ()
    scales_start = 0
    if EXPERTS.chosen > 0:
        expert = tl.load(experts.ids + routed).to(tl.int64)
        columns += expert * sizes.expert_stride
        if TILE.bits < 16:
            scales_start = expert * sizes.expert_scales
        if EPILOGUE.kind == RESIDUAL:
            share = tl.load(experts.weights + routed)
        if out.bias is not None:  # of each expert, once
            stop_here = tl.where(own_chunk == 0, out_stop, 0)
            expert_bias = bias_of_words(out.bias + expert * total, out_start + words * PACK, stop_here, TILE)
        if whole:
            ahead = load_rows(columns, inside, (), 0, last - first, sizes.stride, INPUTS.listed, TILE)

    dtype = x_ptr.dtype.element_ty
    means = ()
    scales = ()
    if INPUTS.norm_in_tiles and INPUTS.norm_centred:
        means, scales = layer_scales(norm.squares, sizes.n_squares, sizes.n_in, sizes.eps, INPUTS.norm_squares, ROWS)
    elif INPUTS.norm_in_tiles:
        scales = rms_scales(norm.squares, sizes.n_squares, sizes.n_in, sizes.eps, INPUTS.norm_squares, ROWS)
    elif INPUTS.norm and not INPUTS.added:
        for row in tl.static_range(ROWS):
            squares = norm.squares + (row_of_x + row) * sizes.n_squares
            if INPUTS.norm_centred:
                mean = mean_of(
                    squares + rows_of_norm * sizes.n_squares, sizes.n_squares, sizes.n_in, INPUTS.norm_squares
                )
                means = means + (mean,)
                scale = layer_scale(squares, mean, sizes.n_squares, sizes.n_in, sizes.eps, INPUTS.norm_squares)
            else:
                scale = rms_scale(squares, sizes.n_squares, sizes.n_in, sizes.eps, INPUTS.norm_squares)
            scales = scales + (scale,)
    added_scale = 1.0
    if INPUTS.added:
        added_scale, scale = scales_after_adding(
            added.sums, sizes.n_squares, sizes.n_in, sizes.added_eps, sizes.of_added, sizes.eps, INPUTS.norm_squares
        )
        scales = (scale,)
    active = 0
    acc = no_sums(ROWS, TILE)
    groups = tl.cdiv(last - first, sizes.group) if INPUTS.several_groups else 1
    for nth in range(groups):
        begin = first
        stop = last
        if INPUTS.several_groups:
            begin = first + nth * sizes.group
            stop = tl.minimum(begin + sizes.group, last)
        if TILE.bits < 16:
            row_of_group = scales_start + (begin // sizes.group).to(tl.int64) * total
            factors, zeros = group_factors(table, row_of_group, out_start + words * PACK, out_stop, TILE)
        if INPUTS.several_groups and INPUTS.taken:
            # Or entries would be stored where a warp of the group before still reads ahead, if for nothing.
            tl.debug_barrier()
        count = 0
        totals = ()
        if INPUTS.taken or summed:
            count, kept, totals = take_inputs(
                x_ptr,
                added,
                partials,
                used,
                norm,
                weights,
                biases,
                means,
                scales,
                added_weights,
                added_scale,
                sizes.of_added,
                block == 0,
                entries,
                sizes.n_in,
                first,
                begin,
                stop,
                thresholds,
                summed,
                ROWS,
                TILE.warps,
                INPUTS,
            )
            active += kept
        listed = entries
        if INPUTS.taken:
            listed = end_list(entries, INPUTS.shared_bytes)
        if not INPUTS.listed:
            count = stop - begin
        if early:
            gdc_launch_dependents()
        sums, x_sums_of_tiles = sum_rows(
            columns,
            inside,
            ahead,
            x_ptr,
            norm,
            means,
            scales,
            sizes.n_in,
            first,
            listed,
            begin - first,
            begin - first + count,
            sizes.stride,
            dtype,
            whole,
            PDL and INPUTS.listed and one_loop and not early,
            ROWS,
            TILE,
            INPUTS,
        )
        if TILE.bits >= 16:
            acc = sums
        else:
            x_sums = ()
            if summed:
                for of_row in tl.static_range(ROWS):
                    x_sums = x_sums + (totals[of_row] / TILE.block_in,)
            else:
                x_sums = (x_sums_of_tiles[:, None],)
            acc = scaled_sums(acc, sums, x_sums, factors, zeros, dtype, ROWS, TILE)
    if PDL and not early:
        gdc_launch_dependents()  # of an empty list, or where the loop did not: see `launch_dependents`
    if INPUTS.listed:
        if (block == 0) | (block == blocks_0) | (block == blocks_0 + blocks_1):
            tl.atomic_add(memory.counts + part, active.to(tl.int64), sem="relaxed")

    # The chunks' partial sums meet in memory. The last programs of a block reduce a slice of it each,
    # for all rows side by side; with a gated table those of its second half do.
    meet: tl.constexpr = EPILOGUE.split or EPILOGUE.two or ROWS > 1 or PACK > 1
    reducer = 0
    width: tl.constexpr = BLOCK_OUT // EPILOGUE.reducers
    all_outputs = tl.num_programs(0) * BLOCK_OUT
    if meet:
        rows = tl.arange(0, LEAST_TILE)
        for k in tl.static_range(PACK):
            sent = place * BLOCK_OUT + k * WORDS + words
            inside = out_start + words * PACK + k < out_stop
            if EPILOGUE.even:
                inside = tl.full((WORDS,), True, tl.int1)
            if TILE.fma:
                for of_row in tl.static_range(ROWS):
                    mine = memory.partial_sums + (chunk * ROWS + of_row) * all_outputs
                    summed_up = tl.sum(acc[k * ROWS + of_row], axis=0)
                    if EXPERTS.chosen > 0:
                        if out.bias is not None:
                            summed_up += expert_bias[k]
                        summed_up *= share
                    send(mine + sent, summed_up, inside)
            else:
                mine = memory.partial_sums + (chunk * ROWS + rows)[:, None] * all_outputs
                send(mine + sent[None, :], acc[k], (rows < ROWS)[:, None] & inside[None, :])
        reducer = chunk - (sizes.n_chunks - EPILOGUE.reducers)
        if EPILOGUE.kind == GATED:
            reducer = tl.where(block >= blocks_0, reducer, -1)
        if reducer < 0:
            return
    columns_here = tl.arange(0, BATCH * width)
    row = row_of_y
    column = reducer * width + columns_here % width
    outs = out_start + column
    if PACK > 1:  # not column % WORDS * PACK + column // WORDS: with that, triton 3.6 computes wrong addresses
        outs = out_start + column * PACK % BLOCK_OUT + column * PACK // BLOCK_OUT
    inside = outs < out_stop
    if EPILOGUE.even:
        inside = tl.full((BATCH * width,), True, tl.int1)
    if ROWS > 1:
        row = columns_here // width
        inside = (outs < out_stop) & (row < ROWS)
    row_of_sums = 0 if EXPERTS.chosen > 0 else row
    at = outs
    own_column = place * BLOCK_OUT + column
    gate_column = own_column
    columns_of_y = total
    if EPILOGUE.kind == GATED:
        at = outs - part_0
        gate_column = own_column - blocks_0 * BLOCK_OUT
        columns_of_y = part_0
    if EPILOGUE.kind == PAIRED:
        gate_column, own_column, pair = columns_of_pairs(reducer, width, TILE)
        gate_column += place * BLOCK_OUT
        own_column += place * BLOCK_OUT
        at = out_start // 2 + pair
        columns_of_y = part_0 // 2
        inside = at < columns_of_y
    if EPILOGUE.kind == RESIDUAL:  # travels while the sums are gathered
        residual = tl.load(out.y + row * total + outs, mask=inside, other=0.0)
    if meet:  # in a fixed order, a few chunks at a time
        y = tl.zeros(inside.shape, dtype=tl.float32)
        up = y
        for first_chunk in range(0, sizes.n_chunks, GATHERED):
            chunks = first_chunk + tl.arange(0, GATHERED)
            there = (chunks < sizes.n_chunks)[:, None] & inside[None, :]
            from_chunk = memory.partial_sums + (chunks * ROWS)[:, None] * all_outputs
            gate_at = from_chunk + (row_of_sums * all_outputs + gate_column)[None, :]
            bits = look(gate_at, there)
            if EPILOGUE.two:
                up_at = from_chunk + (row_of_sums * all_outputs + own_column)[None, :]
                gate_sums, up_sums = received_both(bits, gate_at, look(up_at, there), up_at, there)
                y += tl.sum(gate_sums, axis=0)
                up += tl.sum(up_sums, axis=0)
            else:
                y += tl.sum(received(bits, gate_at, there), axis=0)
    else:
        y = tl.sum(acc[0], axis=0)
        if EXPERTS.chosen > 0:
            if out.bias is not None:
                y += expert_bias[0]
            y *= share
    has_bias: tl.constexpr = EXPERTS.chosen == 0 and out.bias is not None  # of all rows
    if has_bias:
        y += tl.load(out.bias + at, mask=inside, other=0.0).to(tl.float32)
    y = y.to(dtype)
    if EPILOGUE.two:
        if has_bias:
            up += tl.load(out.bias + outs, mask=inside, other=0.0).to(tl.float32)
        y = gated(y, up, sizes.threshold, curve, EPILOGUE.activation, dtype)
        tl.store(out.y + row * columns_of_y + at, y, mask=inside)
    else:
        if EPILOGUE.activation == XIELU:
            y = xielu(y.to(tl.float32), curve).to(dtype)
        elif EPILOGUE.kind == PLAIN and EPILOGUE.activation > 0:
            y = activated(y.to(tl.float32), sizes.threshold, EPILOGUE.activation).to(dtype)
        if EPILOGUE.kind == RESIDUAL:
            added = y.to(tl.float32)
            if EPILOGUE.scaled:
                added = rounded(added * sizes.scale, dtype)
            y = (residual.to(tl.float32) + added).to(dtype)
            keep_squares(y, out.squares, inside, place, reducer, width, ROWS, EPILOGUE)
        if EPILOGUE.kind == BESIDE:
            keep_sums_beside(y, out, outs, inside, block, reducer, EPILOGUE)
        tl.store(out.y + row * total + outs, y, mask=inside)
