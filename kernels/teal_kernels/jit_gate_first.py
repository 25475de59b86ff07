"""The kernel of `teal_kernels.triton_gate_first`, where it is explained. Triton's language, so not type-checked."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from teal_kernels import launching
from teal_kernels.jit_common import LEAST_TILE, matmul, normalised, rms_scale, rms_scales, rounded

FATRELU = tl.constexpr(launching.ACTIVATIONS["fatrelu"])
RELU2 = tl.constexpr(launching.ACTIVATIONS["relu2"])
DRELU = tl.constexpr(launching.ACTIVATIONS["drelu"])


@triton.jit
def _live(gate, threshold, KIND: tl.constexpr):
    dead = gate <= 0
    if KIND == FATRELU:
        dead = gate < threshold
    return dead == 0  # not "gate > 0": NaN must stay live


@triton.jit
def _hidden(gate, up, threshold, dtype: tl.constexpr, KIND: tl.constexpr):
    """What `down` reads: 0 of a neuron that is dead, whatever its `up` is."""
    if KIND == DRELU:
        up = tl.where(up <= 0, 0.0, up)
    active = gate
    if KIND == RELU2:
        active = rounded(gate * gate, dtype)
    return tl.where(_live(gate, threshold, KIND), active * up, 0.0).to(dtype)


@triton.jit
def _inside(ins, n_in, TILE: tl.constexpr):
    """Which inputs of a tile there are."""
    BLOCK_IN: tl.constexpr = TILE.block_in
    return tl.full((BLOCK_IN,), True, tl.int1) if TILE.full else ins < n_in


@triton.jit
def row_tiles(rows, there, start, n_in, TILE: tl.constexpr):
    """Tiles of rows of weights from input `start`, a tuple: all are under way together.

    Args:
        rows: where the rows of one matrix, or of each of two, begin.
    """
    UNROLL: tl.constexpr = TILE.unroll
    MATRICES: tl.constexpr = len(rows)
    weights = ()
    for step in tl.static_range(UNROLL):
        ins = start + step * TILE.block_in + tl.arange(0, TILE.block_in)
        for matrix in tl.static_range(MATRICES):
            weights = weights + (
                tl.load(
                    rows[matrix][:, None] + ins[None, :],
                    mask=there[:, None] & _inside(ins, n_in, TILE)[None, :],
                    other=0.0,
                    eviction_policy=TILE.evict,
                ),
            )
    return weights


@triton.jit
def norm_tiles(norm, start, n_in, TILE: tl.constexpr):
    """Of the inputs of the same tiles, a tuple; none without a norm."""
    UNROLL: tl.constexpr = TILE.unroll
    weights = ()
    if norm is not None:
        for step in tl.static_range(UNROLL):
            ins = start + step * TILE.block_in + tl.arange(0, TILE.block_in)
            weights = weights + (tl.load(norm.weight + ins, mask=_inside(ins, n_in, TILE), other=0.0),)
    return weights


@triton.jit
def input_tiles(x_ptr, start, n_in, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Inputs of the same tiles, a tuple: for each tile those of every row, or one tile of all rows."""
    rows = tl.arange(0, LEAST_TILE)
    UNROLL: tl.constexpr = TILE.unroll
    inputs = ()
    for step in tl.static_range(UNROLL):
        ins = start + step * TILE.block_in + tl.arange(0, TILE.block_in)
        inside = _inside(ins, n_in, TILE)
        if TILE.fma:
            for row in tl.static_range(ROWS):
                inputs = inputs + (tl.load(x_ptr + row * n_in + ins, mask=inside, other=0.0),)
        else:
            at = x_ptr + rows[:, None] * n_in + ins[None, :]
            inputs = inputs + (tl.load(at, mask=(rows < ROWS)[:, None] & inside[None, :], other=0.0),)
    return inputs


@triton.jit
def norm_scales(norm, sizes, ROWS: tl.constexpr, SQUARES: tl.constexpr, TILE: tl.constexpr):
    """What the norm multiplies each row with, as `_added` takes it."""
    scales = ()
    if norm is not None:
        if TILE.fma:
            for row in tl.static_range(ROWS):
                squares = norm.squares + row * sizes.n_squares
                scales = scales + (rms_scale(squares, sizes.n_squares, sizes.n_in, sizes.eps, SQUARES),)
        else:
            scales = (rms_scales(norm.squares, sizes.n_squares, sizes.n_in, sizes.eps, SQUARES, ROWS),)
    return scales


@triton.jit
def _no_sums(MATRICES: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):
    """For each matrix a tile of zeros for every row, or one of all rows: a tuple."""
    BLOCK_OUT: tl.constexpr = TILE.block_out
    BLOCK_IN: tl.constexpr = TILE.block_in
    sums = ()
    for _ in tl.static_range(MATRICES):
        if TILE.fma:
            for _row in tl.static_range(ROWS):
                sums = sums + (tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=tl.float32),)
        else:
            sums = sums + (tl.zeros((LEAST_TILE, BLOCK_OUT), dtype=tl.float32),)
    return sums


@triton.jit
def _added(
    sums,
    weights,
    inputs,
    scales,
    weights_of_norm,
    dtype: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    MATRICES: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """The sums, and tiles of weights times their inputs, normalised where there are scales."""
    NORM: tl.constexpr = len(scales) > 0
    UNROLL: tl.constexpr = TILE.unroll
    for step in tl.static_range(UNROLL):
        values = ()
        if TILE.fma:
            for row in tl.static_range(ROWS):
                x = inputs[step * ROWS + row].to(tl.float32)
                if NORM:
                    x = normalised(x, scales[row], weights_of_norm[step], dtype, PLUS_ONE)
                values = values + (x[None, :],)
        else:
            x = inputs[step]
            if NORM:
                x = normalised(x, scales[0][:, None], weights_of_norm[step][None, :], dtype, PLUS_ONE).to(dtype)
            values = (x,)
        added = ()
        for matrix in tl.static_range(MATRICES):
            weight = weights[step * MATRICES + matrix]
            if TILE.fma:
                for row in tl.static_range(ROWS):
                    added = added + (sums[matrix * ROWS + row] + weight.to(tl.float32) * values[row],)
            else:
                added = added + (matmul(values[0], tl.trans(weight), sums[matrix]),)
        sums = added
    return sums


@triton.jit
def row_products(
    x_ptr,
    norm,
    scales,
    rows,
    there,
    n_in,
    weights,
    inputs,
    weights_of_norm,
    PLUS_ONE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Rows of weights, as `row_tiles` has them, times each row of x: for each matrix and row of x (block_out,) float32.

    On the FMA path the first tiles are under way.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    MATRICES: tl.constexpr = len(rows)
    sums = _no_sums(MATRICES, ROWS, TILE)
    if TILE.at_once:
        sums = _added(sums, weights, inputs, scales, weights_of_norm, dtype, PLUS_ONE, MATRICES, ROWS, TILE)
    elif TILE.fma:
        for start in range(0, n_in, TILE.block_in * TILE.unroll):
            sums = _added(sums, weights, inputs, scales, weights_of_norm, dtype, PLUS_ONE, MATRICES, ROWS, TILE)
            following = start + TILE.block_in * TILE.unroll
            weights = row_tiles(rows, there, following, n_in, TILE)
            weights_of_norm = norm_tiles(norm, following, n_in, TILE)
            inputs = input_tiles(x_ptr, following, n_in, ROWS, TILE)
    else:  # Triton sees to tiles under way
        for start in range(0, n_in, TILE.block_in * TILE.unroll):
            sums = _added(
                sums,
                row_tiles(rows, there, start, n_in, TILE),
                input_tiles(x_ptr, start, n_in, ROWS, TILE),
                scales,
                norm_tiles(norm, start, n_in, TILE),
                dtype,
                PLUS_ONE,
                MATRICES,
                ROWS,
                TILE,
            )
    products = ()
    for matrix in tl.static_range(MATRICES):
        for row in tl.static_range(ROWS):
            if TILE.fma:
                products = products + (tl.sum(sums[matrix * ROWS + row], axis=1),)
            else:
                of_row = (tl.arange(0, LEAST_TILE) == row)[:, None]
                products = products + (tl.sum(tl.where(of_row, sums[matrix], 0.0), axis=0),)
    return products


@triton.jit
def biased(product, bias_ptr, neurons, there, dtype: tl.constexpr):
    """A product and its bias, rounded as the dtype holds it."""
    if bias_ptr is not None:
        product += tl.load(bias_ptr + neurons, mask=there, other=0.0).to(tl.float32)
    return rounded(product, dtype)


@triton.jit
def gate_first_kernel(
    x_ptr,
    norm,
    gate,
    up,
    h_ptr,
    counts_ptr,
    sizes,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    SQUARES: tl.constexpr,
    WHAT: tl.constexpr,
    NEURONS: tl.constexpr,
    GATE: tl.constexpr,
    UP: tl.constexpr,
    PDL: tl.constexpr,
):
    """x (ROWS, in), h (ROWS, out), weights (out, in); see `triton_gate_first`.

    Args:
        norm: weight (in,) and partial sums of squares (ROWS, n) of x; or None.
        gate: weight and bias of the gate, or its product (ROWS, out) as the weight.
        up: weight and bias.
        counts_ptr: live neurons of each row are added to it; or None.
        sizes: as in `triton_gate_first`.
        WHAT: which of its launches.
        GATE, UP: tiles.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    n_in = sizes.n_in
    n_out = sizes.n_out
    first = tl.program_id(0) * NEURONS
    numbers = tl.arange(0, NEURONS)
    neurons = first + numbers
    inside = neurons < n_out
    rows = (gate.weight + neurons.to(tl.int64) * sizes.gate_stride,)
    if WHAT.dense:
        rows = rows + (up.weight + neurons.to(tl.int64) * sizes.up_stride,)
    # Which rows of the gate are read does not depend on the inputs: the first tiles travel while this program waits.
    if PDL and not WHAT.ahead:
        gdc_wait()
    weights = ()
    weights_of_norm = ()
    if WHAT.gates and GATE.fma:
        weights = row_tiles(rows, inside, 0, n_in, GATE)
        weights_of_norm = norm_tiles(norm, 0, n_in, GATE)
    if PDL and WHAT.ahead:
        gdc_wait()
    if PDL and not WHAT.late:
        gdc_launch_dependents()
    gates = ()
    ups = ()
    if WHAT.gates:
        # Before the scales, for whose sums threads wait.
        inputs = input_tiles(x_ptr, 0, n_in, ROWS, GATE) if GATE.fma else ()
        scales = norm_scales(norm, sizes, ROWS, SQUARES, GATE)
        products = row_products(
            x_ptr, norm, scales, rows, inside, n_in, weights, inputs, weights_of_norm, WHAT.plus_one, ROWS, GATE
        )
        for row in tl.static_range(ROWS):
            gates = gates + (biased(products[row], gate.bias, neurons, inside, dtype),)
            if WHAT.dense:
                ups = ups + (biased(products[ROWS + row], up.bias, neurons, inside, dtype),)
    else:
        for row in tl.static_range(ROWS):
            gates = gates + (tl.load(gate.weight + row * n_out + neurons, mask=inside, other=0.0).to(tl.float32),)
    if PDL and WHAT.late:
        gdc_launch_dependents()
    if WHAT.dense:
        for row in tl.static_range(ROWS):
            hidden = _hidden(gates[row], ups[row], sizes.threshold, dtype, KIND)
            tl.store(h_ptr + row * n_out + neurons, hidden, mask=inside)
    else:
        live = inside & False
        lives = tl.zeros((NEURONS,), tl.int32)
        for row in tl.static_range(ROWS):
            live_for_row = inside & _live(gates[row], sizes.threshold, KIND)
            lives += live_for_row.to(tl.int32)
            live |= live_for_row
        for row in tl.static_range(ROWS):
            tl.store(h_ptr + row * n_out + neurons, tl.zeros((NEURONS,), dtype=dtype), mask=inside & (live == 0))
        rank = tl.cumsum(live.to(tl.int32), axis=0)
        count = tl.sum(live.to(tl.int32), axis=0)
        if counts_ptr is not None:
            tl.atomic_add(counts_ptr, tl.sum(lives, axis=0).to(tl.int64), mask=count > 0, sem="relaxed")
        if not WHAT.gates:
            scales = norm_scales(norm, sizes, ROWS, SQUARES, UP)
        for begin in range(0, count, UP.block_out):
            slots = begin + tl.arange(0, UP.block_out)
            filled = slots < count
            # The neuron in a slot of the list: as many as lie before it have at most the slot's number of live ones.
            place = tl.sum((rank[None, :] <= slots[:, None]).to(tl.int32), axis=1)
            outs = tl.where(filled, first + place, first)
            rows_of_up = (up.weight + outs.to(tl.int64) * sizes.up_stride,)
            of_slots = row_products(
                x_ptr,
                norm,
                scales,
                rows_of_up,
                filled,
                n_in,
                row_tiles(rows_of_up, filled, 0, n_in, UP) if UP.fma else (),
                input_tiles(x_ptr, 0, n_in, ROWS, UP) if UP.fma else (),
                norm_tiles(norm, 0, n_in, UP) if UP.fma else (),
                WHAT.plus_one,
                ROWS,
                UP,
            )
            for row in tl.static_range(ROWS):
                up_of_slots = biased(of_slots[row], up.bias, outs, filled, dtype)
                gate_of_slots = tl.sum(tl.where(place[:, None] == numbers[None, :], gates[row][None, :], 0.0), axis=1)
                # It may be dead for this row and live for another.
                of_row = _hidden(gate_of_slots, up_of_slots, sizes.threshold, dtype, KIND)
                tl.store(h_ptr + row * n_out + outs, of_row, mask=filled)
