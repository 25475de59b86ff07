"""The kernel of `teal_kernels.triton_gate_first`, where it is explained. Triton's language, so not type-checked."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from teal_kernels.jit_common import rounded

RELU = tl.constexpr(0)
FATRELU = tl.constexpr(1)
RELU2 = tl.constexpr(2)
DRELU = tl.constexpr(3)


@triton.jit
def _live(gate, threshold, KIND: tl.constexpr):
    dead = gate <= 0
    if KIND == FATRELU:
        dead = gate < threshold
    return dead == 0  # not "gate > 0": NaN must stay live


@triton.jit
def _products(
    x_ptr,
    weight_ptr,
    bias_ptr,
    outs,
    there,
    n_in,
    stride,
    ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    UNROLL: tl.constexpr,
    EVICT: tl.constexpr,
):
    """The rows `outs` of a weight times each row of x: for each of these (BLOCK_OUT,), rounded as its dtype is."""
    dtype = x_ptr.dtype.element_ty
    ins = tl.arange(0, BLOCK_IN)
    rows_of_weight = weight_ptr + outs.to(tl.int64)[:, None] * stride + ins[None, :]
    acc = ()
    for _ in tl.static_range(ROWS):
        acc = acc + (tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=tl.float32),)
    for start in range(0, n_in, BLOCK_IN * UNROLL):
        weights = ()  # all loads first: they are under way together
        for step in tl.static_range(UNROLL):
            at = start + step * BLOCK_IN
            weights = weights + (
                tl.load(
                    rows_of_weight + at,
                    mask=there[:, None] & (at + ins < n_in)[None, :],
                    other=0.0,
                    eviction_policy=EVICT,
                ),
            )
        for step in tl.static_range(UNROLL):
            at = start + step * BLOCK_IN + ins
            weight = weights[step].to(tl.float32)
            added = ()
            for row in tl.static_range(ROWS):
                x = tl.load(x_ptr + row * n_in + at, mask=at < n_in, other=0.0).to(tl.float32)
                added = added + (acc[row] + weight * x[None, :],)
            acc = added
    products = ()
    for row in tl.static_range(ROWS):
        product = tl.sum(acc[row], axis=1)
        if HAS_BIAS:
            product += tl.load(bias_ptr + outs, mask=there, other=0.0).to(tl.float32)
        products = products + (rounded(product, dtype),)
    return products


@triton.jit
def gate_first_kernel(
    x_ptr,
    gate_ptr,
    gate_bias_ptr,
    weight_ptr,
    bias_ptr,
    h_ptr,
    n_in,
    n_out,
    gate_stride,
    stride,
    threshold,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    FUSED: tl.constexpr,
    HAS_GATE_BIAS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NEURONS: tl.constexpr,
    GATE_BLOCK_IN: tl.constexpr,
    GATE_UNROLL: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    UNROLL: tl.constexpr,
    EVICT: tl.constexpr,
    PDL: tl.constexpr,
):
    """x (ROWS, in), h (ROWS, out), weights (out, in) with rows `stride` apart; see `triton_gate_first`.

    `gate_ptr` is the gate product (ROWS, out) or, where FUSED, the weight that gives it.
    """
    dtype = x_ptr.dtype.element_ty
    first = tl.program_id(0) * NEURONS
    numbers = tl.arange(0, NEURONS)
    neurons = first + numbers
    inside = neurons < n_out
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if FUSED:
        gates = _products(
            x_ptr,
            gate_ptr,
            gate_bias_ptr,
            tl.where(inside, neurons, first),
            inside,
            n_in,
            gate_stride,
            ROWS,
            HAS_GATE_BIAS,
            NEURONS,
            GATE_BLOCK_IN,
            GATE_UNROLL,
            EVICT,
        )
    else:
        gates = ()
        for row in tl.static_range(ROWS):
            gates = gates + (tl.load(gate_ptr + row * n_out + neurons, mask=inside, other=0.0).to(tl.float32),)
    live = inside & False
    for row in tl.static_range(ROWS):
        live |= inside & _live(gates[row], threshold, KIND)
    for row in tl.static_range(ROWS):
        tl.store(h_ptr + row * n_out + neurons, tl.zeros((NEURONS,), dtype=dtype), mask=inside & (live == 0))
    rank = tl.cumsum(live.to(tl.int32), axis=0)
    count = tl.sum(live.to(tl.int32), axis=0)
    for begin in range(0, count, BLOCK_OUT):
        slots = begin + tl.arange(0, BLOCK_OUT)
        there = slots < count
        # The neuron in a slot of the list: as many as lie before it have at most the slot's number of live ones.
        place = tl.sum((rank[None, :] <= slots[:, None]).to(tl.int32), axis=1)
        outs = tl.where(there, first + place, first)
        ups = _products(
            x_ptr,
            weight_ptr,
            bias_ptr,
            outs,
            there,
            n_in,
            stride,
            ROWS,
            HAS_BIAS,
            BLOCK_OUT,
            BLOCK_IN,
            UNROLL,
            EVICT,
        )
        for row in tl.static_range(ROWS):
            up = ups[row]
            if KIND == DRELU:
                up = tl.where(up <= 0, 0.0, up)
            gate = tl.sum(tl.where(place[:, None] == numbers[None, :], gates[row][None, :], 0.0), axis=1)
            active = gate
            if KIND == RELU2:
                active = rounded(gate * gate, dtype)
            # It may be dead for this row and live for another.
            hidden = tl.where(_live(gate, threshold, KIND), active * up, 0.0)
            tl.store(h_ptr + row * n_out + outs, hidden.to(dtype), mask=there)
