"""The kernels of `teal_kernels.triton_routed`, where they are explained. Triton's language, so not type-checked."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from teal_kernels import launching
from teal_kernels.jit_common import activated, rounded
from teal_kernels.jit_gate_first import biased, input_tiles, norm_scales, norm_tiles, row_products, row_tiles

DRELU = tl.constexpr(launching.ACTIVATIONS["drelu"])


@triton.jit
def group_logits_kernel(
    x_ptr,
    norm,
    layer,
    y_ptr,
    counts_ptr,
    sizes,
    ROWS: tl.constexpr,
    SQUARES: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    CHOOSES: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """A layer of a router, weights (out, in): x (ROWS, in) to y (ROWS, out).

    Args:
        norm: as in `gate_first_kernel`.
        counts_ptr: neurons of groups that a row chose are added to it; or None.
        CHOOSES: whether y is int32, 1 where a group is chosen and else 0; or of x's dtype, behind a ReLU.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    outs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    there = outs < sizes.n_out
    rows = (layer.weight + outs.to(tl.int64) * sizes.stride,)
    weights = ()
    weights_of_norm = ()
    if TILE.fma:  # they travel while this program waits
        weights = row_tiles(rows, there, 0, sizes.n_in, TILE)
        weights_of_norm = norm_tiles(norm, 0, sizes.n_in, TILE)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    inputs = input_tiles(x_ptr, 0, sizes.n_in, ROWS, TILE) if TILE.fma else ()
    scales = norm_scales(norm, sizes, ROWS, SQUARES, TILE)
    products = row_products(
        x_ptr, norm, scales, rows, there, sizes.n_in, weights, inputs, weights_of_norm, PLUS_ONE, ROWS, TILE
    )
    total = tl.zeros((OUTPUTS,), tl.int32)
    for row in tl.static_range(ROWS):
        logits = biased(products[row], layer.bias, outs, there, dtype)
        passed = (logits <= 0) == 0  # not "> 0": a NaN must choose, and show
        if CHOOSES:
            chosen = (there & passed).to(tl.int32)
            total += chosen
            tl.store(y_ptr + row * sizes.n_out + outs, chosen, mask=there)
        else:
            tl.store(y_ptr + row * sizes.n_out + outs, tl.where(passed, logits, 0.0).to(dtype), mask=there)
    if CHOOSES:
        if counts_ptr is not None:
            tl.atomic_add(counts_ptr, (tl.sum(total, axis=0) * sizes.group).to(tl.int64), sem="relaxed")


@triton.jit
def routed_kernel(
    x_ptr,
    norm,
    gate,
    up,
    chosen_ptr,
    h_ptr,
    sizes,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    SQUARES: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    WHOLE: tl.constexpr,
    NEURONS: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """x (ROWS, in), h (ROWS, out), weights of gate and up (out, in); the neurons of a program are of one group.

    Args:
        norm: as in `gate_first_kernel`.
        chosen_ptr: (ROWS, groups) int32, 0 where a group was left out.
        KIND: activation.
        WHOLE: compute all neurons; what was left out is zero all the same.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    n_in = sizes.n_in
    n_out = sizes.n_out
    first = tl.program_id(0) * NEURONS
    neurons = first + tl.arange(0, NEURONS)
    there = neurons < n_out
    # What is read depends on what the kernel before chose.
    if PDL:
        gdc_wait()
    group = first // sizes.group
    flags = ()
    any_row = 0
    for row in tl.static_range(ROWS):
        flag = tl.load(chosen_ptr + row * sizes.n_groups + group)
        flags = flags + (flag,)
        any_row |= flag
    if not WHOLE:
        if any_row == 0:
            for row in tl.static_range(ROWS):
                tl.store(h_ptr + row * n_out + neurons, tl.zeros((NEURONS,), dtype=dtype), mask=there)
            return
    rows = (gate.weight + neurons.to(tl.int64) * sizes.gate_stride, up.weight + neurons.to(tl.int64) * sizes.up_stride)
    products = row_products(
        x_ptr,
        norm,
        norm_scales(norm, sizes, ROWS, SQUARES, TILE),
        rows,
        there,
        n_in,
        row_tiles(rows, there, 0, n_in, TILE) if TILE.fma else (),
        input_tiles(x_ptr, 0, n_in, ROWS, TILE) if TILE.fma else (),
        norm_tiles(norm, 0, n_in, TILE) if TILE.fma else (),
        PLUS_ONE,
        ROWS,
        TILE,
    )
    if PDL:
        gdc_launch_dependents()
    for row in tl.static_range(ROWS):
        of_gate = biased(products[row], gate.bias, neurons, there, dtype)
        of_up = biased(products[ROWS + row], up.bias, neurons, there, dtype)
        if KIND == DRELU:
            of_up = tl.where(of_up <= 0, 0.0, of_up)
        hidden = (rounded(activated(of_gate, sizes.threshold, KIND), dtype) * of_up).to(dtype)
        hidden = tl.where(flags[row] != 0, hidden, tl.zeros((NEURONS,), dtype=dtype))
        tl.store(h_ptr + row * n_out + neurons, hidden, mask=there)
