"""Functions that several kernels use: norms, rounding, products, and sums that programs of a launch send each other."""

import triton
import triton.language as tl

from teal_kernels import launching

EMPTY = tl.constexpr(launching.EMPTY)
MINUS_INFINITY = tl.constexpr(0xFF800000)
INTERPRETING = tl.constexpr(launching.interpreting())
LEAST_TILE = tl.constexpr(launching.LEAST_TILE)
_SILU = tl.constexpr(launching.ACTIVATIONS["silu"])
_GELU = tl.constexpr(launching.ACTIVATIONS["gelu"])
_GELU_TANH = tl.constexpr(launching.ACTIVATIONS["gelu_tanh"])
_RELU2 = tl.constexpr(launching.ACTIVATIONS["relu2"])
_FATRELU = tl.constexpr(launching.ACTIVATIONS["fatrelu"])
_DRELU = tl.constexpr(launching.ACTIVATIONS["drelu"])
_CLAMPED_SWIGLU = tl.constexpr(launching.ACTIVATIONS["clamped_swiglu"])


@triton.jit
def _total(sums_ptr, n_sums, SQUARES: tl.constexpr):
    """Of partial sums of one row."""
    each = tl.arange(0, SQUARES)
    return tl.sum(tl.load(sums_ptr + each, mask=each < n_sums, other=0.0), axis=0)


@triton.jit
def rms_scale(squares_ptr, n_squares, n_in, eps, SQUARES: tl.constexpr):
    """What an RMS norm multiplies one row with, from partial sums of its squares."""
    # The quotient is ready before the squares are: dividing their sum would wait for them.
    return tl.rsqrt(_total(squares_ptr, n_squares, SQUARES) * (1.0 / n_in) + eps)


@triton.jit
def scales_after_adding(sums_ptr, n_sums, n_in, added_eps, added_scale, eps, SQUARES: tl.constexpr):
    """Where the RMS norm of y is still to be added to a stream h: what it multiplies y with, and what an RMS norm of
    the sum multiplies that with. From partial sums of y y, h h, h w y and w y w y, w the weight of y's norm: of them
    the squares of the sum follow without another pass."""
    scale = tl.rsqrt(_total(sums_ptr, n_sums, SQUARES) * (1.0 / n_in) + added_eps)
    share = scale * added_scale
    squares = _total(sums_ptr + n_sums, n_sums, SQUARES)
    squares += 2.0 * share * _total(sums_ptr + 2 * n_sums, n_sums, SQUARES)
    squares += share * share * _total(sums_ptr + 3 * n_sums, n_sums, SQUARES)
    return scale, tl.rsqrt(tl.maximum(squares, 0.0) * (1.0 / n_in) + eps)


@triton.jit
def keep_squares(y, at, inside, place, reducer, WIDTH: tl.constexpr, ROWS: tl.constexpr, EPILOGUE: tl.constexpr):
    """Write the partial sums of squares of y that one program has, and for a layer norm those of y: one of each row.

    Args:
        y: (rows WIDTH,), rows up to a power of two.
    """
    BATCH: tl.constexpr = EPILOGUE.batch
    square = tl.where(inside, y.to(tl.float32) * y.to(tl.float32), 0.0)
    each = tl.arange(0, BATCH)
    of_block = at + (each * tl.num_programs(0) + place) * EPILOGUE.reducers + reducer
    tl.store(of_block, tl.sum(tl.reshape(square, (BATCH, WIDTH)), axis=1), mask=each < ROWS)
    if EPILOGUE.sums:
        written = tl.reshape(tl.where(inside, y.to(tl.float32), 0.0), (BATCH, WIDTH))
        of_block += ROWS * tl.num_programs(0) * EPILOGUE.reducers
        tl.store(of_block, tl.sum(written, axis=1), mask=each < ROWS)


@triton.jit
def keep_sums_beside(y, out, outs, inside, block, reducer, EPILOGUE: tl.constexpr):
    """Write the partial sums that `scales_after_adding` reads: those of one program, of y y, h h, h w y and w y w y.

    Args:
        out: as in `triton_gemv`.
        outs: the columns of y.
    """
    of_norm = tl.load(out.norm_weight + outs, mask=inside, other=0.0).to(tl.float32)
    if EPILOGUE.plus_one:
        of_norm += 1.0
    stream = tl.load(out.stream + outs, mask=inside, other=0.0).to(tl.float32)
    value = tl.where(inside, y.to(tl.float32), 0.0)
    weighted = of_norm * value
    at = out.squares + block * EPILOGUE.reducers + reducer
    every = tl.num_programs(0) * EPILOGUE.reducers
    tl.store(at, tl.sum(value * value, axis=0))
    tl.store(at + every, tl.sum(stream * stream, axis=0))
    tl.store(at + 2 * every, tl.sum(stream * weighted, axis=0))
    tl.store(at + 3 * every, tl.sum(weighted * weighted, axis=0))


@triton.jit
def mean_of(sums_ptr, n_sums, n_in, SQUARES: tl.constexpr):
    """The mean of one row, from partial sums of it."""
    return _total(sums_ptr, n_sums, SQUARES) * (1.0 / n_in)


@triton.jit
def layer_scale(squares_ptr, mean, n_squares, n_in, eps, SQUARES: tl.constexpr):
    """What a layer norm multiplies one row with, less its mean, from partial sums of its squares."""
    variance = mean_of(squares_ptr, n_squares, n_in, SQUARES) - mean * mean
    return tl.rsqrt(tl.maximum(variance, 0.0) + eps)  # rounding may leave a constant row less than nothing


@triton.jit
def rms_scales(squares_ptr, n_squares, n_in, eps, SQUARES: tl.constexpr, ROWS: tl.constexpr):
    """`rms_scale` of the rows of a batch: (LEAST_TILE,) float32, 0 for those that there are not."""
    rows = tl.arange(0, LEAST_TILE)
    scales = tl.zeros((LEAST_TILE,), tl.float32)
    for row in tl.static_range(ROWS):
        scales = tl.where(rows == row, rms_scale(squares_ptr + row * n_squares, n_squares, n_in, eps, SQUARES), scales)
    return scales


@triton.jit
def layer_scales(squares_ptr, n_squares, n_in, eps, SQUARES: tl.constexpr, ROWS: tl.constexpr):
    """Means and `layer_scale` of the rows of a batch: (LEAST_TILE,) float32 each. Partial sums lie behind those of
    squares."""
    rows = tl.arange(0, LEAST_TILE)
    means = tl.zeros((LEAST_TILE,), tl.float32)
    scales = tl.zeros((LEAST_TILE,), tl.float32)
    for row in tl.static_range(ROWS):
        mean = mean_of(squares_ptr + (ROWS + row) * n_squares, n_squares, n_in, SQUARES)
        scale = layer_scale(squares_ptr + row * n_squares, mean, n_squares, n_in, eps, SQUARES)
        means = tl.where(rows == row, mean, means)
        scales = tl.where(rows == row, scale, scales)
    return means, scales


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 as the dtype would hold it. (The interpreter cannot multiply in bfloat16, and a GPU need not.)"""
    return x.to(dtype).to(tl.float32)


@triton.jit
def normalised(x, scale, weight, dtype: tl.constexpr, PLUS_ONE: tl.constexpr = False):
    """What an RMS norm makes of x, float32, rounded where transformers rounds: Gemma's, of 1 + weight, once."""
    weight = weight.to(tl.float32)
    if PLUS_ONE:
        normal = rounded(x.to(tl.float32) * scale * (1.0 + weight), dtype)
    else:
        normal = rounded(rounded(x.to(tl.float32) * scale, dtype) * weight, dtype)
    return normal


@triton.jit
def layer_normalised(x, mean, scale, weight, bias, dtype: tl.constexpr, PLUS_ONE: tl.constexpr):
    """What a layer norm makes of x, float32, rounded once, as torch's is."""
    weight = weight.to(tl.float32)
    if PLUS_ONE:
        weight += 1.0
    return rounded((x.to(tl.float32) - mean) * scale * weight + bias.to(tl.float32), dtype)


@triton.jit
def tanh(x):
    """Of float32. (`tl` has none that the interpreter knows.)"""
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def activated(x, threshold, KIND: tl.constexpr):
    """An activation of float32, by its number in `launching.ACTIVATIONS`; `threshold` is FATReLU's."""
    if KIND == _SILU:
        y = x * tl.sigmoid(x)
    elif KIND == _GELU:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == _GELU_TANH:
        y = 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif KIND == _FATRELU:
        y = tl.where(x < threshold, 0.0, x)
    else:
        y = tl.where(x <= 0.0, 0.0, x)  # not `maximum`: NaN must show
        if KIND == _RELU2:
            y = y * y
    return y


@triton.jit
def xielu(x, curve):
    """A parabola and a line above zero, an exponential and a line below (arXiv 2411.13010)."""
    # exp(x) - 1 - x by its series where the difference would be of rounding.
    series = 1.0 + x / 5.0 * (1.0 + x / 6.0 * (1.0 + x / 7.0 * (1.0 + x / 8.0)))
    series = 0.5 * x * x * (1.0 + x / 3.0 * (1.0 + x / 4.0 * series))
    bent = tl.where(x > -0.5, series, tl.exp(x) - 1.0 - x)
    return tl.where(x > 0.0, curve.first * x * x, curve.second * bent) + curve.third * x


@triton.jit
def clamped_swiglu(gate, up, limit, curve, dtype: tl.constexpr):
    """gpt-oss's: gate times its sigmoid, steeper, and up plus one, both clamped; rounded where transformers rounds."""
    gate = tl.where(gate > limit, limit, gate)
    up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    return rounded(gate * tl.sigmoid(curve.first * gate), dtype), rounded(up + 1.0, dtype)


@triton.jit
def gated(gate, up, threshold, curve, KIND: tl.constexpr, dtype: tl.constexpr):
    """activation(gate) * up, rounded where transformers rounds.

    Args:
        gate: in the dtype.
        up: float32.
        threshold, curve: of the activation, where it has them.
        KIND: one of `launching.ACTIVATIONS`.
    """
    if KIND == _CLAMPED_SWIGLU:
        gate, up = clamped_swiglu(gate.to(tl.float32), rounded(up, dtype), threshold, curve, dtype)
    else:  # in this order: with up rounded first, other code comes out than was measured
        gate = rounded(activated(gate.to(tl.float32), threshold, KIND), dtype)
        up = rounded(up, dtype)
    if KIND == _DRELU:
        up = tl.where(up <= 0.0, 0.0, up)
    return (gate * up).to(dtype)


@triton.jit
def matmul(a, b, acc):
    """acc + a @ b, float32. (The interpreter cannot multiply in bfloat16.)"""
    if INTERPRETING:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def launch_dependents(now):
    """Where `now`, this program lets the programs of the next kernel come, as `gdc_launch_dependents` does.

    They come once all programs have. A product does it after its wait for the kernel before, since whoever comes may
    read what that one wrote. Late, since those who come while others still read crowd the multiprocessors that are
    done first: a block of Llama-2-7B took 7 to 20 microseconds longer. But before its last rows have come, since it
    takes a while to be ready; in a loop that asks for rows ahead the condition costs more than that. (H100)
    Where few come, all this does not matter.
    """
    tl.inline_asm_elementwise(
        "{ .reg .pred now; setp.ne.b32 now, $1, 0; @now griddepcontrol.launch_dependents; mov.b32 $0, 0; }",
        "=r,r",
        [now.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def send(at, sums, inside):
    """Put float32 sums where another program of this launch waits for them, as `received` does.

    Each word is its own message, so nothing needs to be ordered. A NaN becomes the usual one: the
    bits of one other mean "not here yet".
    """
    sums = tl.where(sums == sums, sums, float("nan"))
    tl.store(at, sums.to(tl.int32, bitcast=True), mask=inside)


@triton.jit
def look(at, inside):
    """The bits at places that `send` fills; 0 outside. Volatile: the L1 cache may hold older ones."""
    return tl.load(at, mask=inside, other=0, volatile=True)


@triton.jit
def missing(bits):
    """Whether some word has not come. Read as a whole number, nothing that is sent is above -inf: to compare each with
    EMPTY is four times the instructions."""
    return tl.max(bits.to(tl.uint32, bitcast=True)) > MINUS_INFINITY


@triton.jit
def received(bits, at, inside):
    """The float32 sums sent to these places, once all have come; the places are empty for the next launch.

    `bits` are from a first look, at no fewer words than the program has threads: fewer would be held
    by several threads each, which could see different ones and take different decisions. Only
    programs at the end of a grid wait: the others they wait for run or have run, and among
    themselves they are few enough to run at one time.
    """
    while missing(bits):
        bits = look(at, inside)  # at all of them: at some it would be word by word, which takes longer
    tl.store(at, EMPTY, mask=inside)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def received_both(bits, at, other_bits, other_at, inside):
    """`received`, for two sets of places at a time: one after the other the second would be looked at anew."""
    while missing(bits) | missing(other_bits):
        bits = look(at, inside)
        other_bits = look(other_at, inside)
    tl.store(at, EMPTY, mask=inside)
    tl.store(other_at, EMPTY, mask=inside)
    return bits.to(tl.float32, bitcast=True), other_bits.to(tl.float32, bitcast=True)


@triton.jit
def lanes_inside(begin, stop, vector, LANES: tl.constexpr, FULL: tl.constexpr):
    """Which inputs there are of a vector, so many vectors after input `begin`."""
    index = begin + vector * LANES + tl.arange(0, LANES)
    return tl.full((LANES,), True, tl.int1) if FULL else index < stop
