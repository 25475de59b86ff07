"""Lists of the inputs that one program keeps. Triton's language, so not type-checked.

An entry is an index below 2**15 and a value, in one word of twice the value's size. A list lies in shared
memory, for which Triton has no words, so that is PTX: through global memory a program waits for the
L2 twice before it reads its first weight, to store its list and to load it. Lists too long for
that (`teal_kernels.triton_gemv`), and all in the interpreter, lie in global memory all the same.

Where a list begins is a pointer to words in global memory, or an address in shared memory as int32.
"""

import triton
import triton.language as tl

from teal_kernels.jit_common import INTERPRETING, lanes_inside, layer_normalised, normalised, rounded
from teal_kernels.jit_partials import merged_partials


@triton.jit
def begin_list(scratch, SHARED: tl.constexpr):
    """Where a list begins: at `scratch`, or so many bytes of shared memory (one list a kernel)."""
    at = scratch
    if SHARED > 0:
        at = tl.inline_asm_elementwise(
            f"{{ .shared .align 16 .b8 teal_list[{SHARED}]; mov.u32 $0, teal_list; }}",
            "=r",
            [],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    return at


@triton.jit
def put(at, slots, index, value, kept, dtype: tl.constexpr, SHARED: tl.constexpr):
    """Store entries of a list where they are kept; `value` float32 as `dtype` holds it exactly."""
    if dtype.primitive_bitwidth == 16:
        word = index << 16 | value.to(dtype).to(tl.uint16, bitcast=True).to(tl.int32)
    else:
        word = index.to(tl.int64) << 32 | value.to(tl.uint32, bitcast=True).to(tl.int64)
    if SHARED > 0:
        bits: tl.constexpr = 2 * dtype.primitive_bitwidth
        register: tl.constexpr = "r" if bits == 32 else "l"
        tl.inline_asm_elementwise(
            f"{{ .reg .pred kept; setp.ne.b32 kept, $3, 0; @kept st.shared.b{bits} [$1], $2; mov.b32 $0, 0; }}",
            f"=r,r,{register},r",
            [at + slots * (bits // 8), word, kept.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.store(at + slots, word, mask=kept)


@triton.jit
def end_list(at, SHARED: tl.constexpr):
    """Where the list begins, once all threads have stored their entries."""
    tl.debug_barrier()
    if SHARED > 0:  # loads of entries need this result, so the compiler cannot move them up to before the barrier
        at = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [at], dtype=tl.int32, is_pure=False, pack=1)
    return at


@triton.jit
def listed_index(at, slots, inside, dtype: tl.constexpr, SHARED: tl.constexpr):
    """Indices of entries; anything where not `inside`."""
    if SHARED > 0:
        size: tl.constexpr = dtype.primitive_bitwidth // 8
        index = tl.inline_asm_elementwise(
            f"ld.shared.u{8 * size} $0, [$1+{size}];",
            "=r,r",
            [at + slots * (2 * size)],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        index = (tl.load(at + slots, mask=inside, other=0) >> dtype.primitive_bitwidth).to(tl.int32)
    return index


@triton.jit
def listed_value(at, slots, inside, dtype: tl.constexpr, SHARED: tl.constexpr):
    """Values of entries, float32; 0 where not `inside`.

    Loaded apart from the index: with both in hand the compiler would let each tile's sum go before
    the next tile's load, to save registers, and nothing be under way.
    """
    if SHARED > 0:
        size: tl.constexpr = dtype.primitive_bitwidth // 8
        bits = tl.inline_asm_elementwise(
            f"ld.shared.u{8 * size} $0, [$1];",
            "=r,r",
            [at + slots * (2 * size)],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
        word = tl.where(inside, bits, 0)
    else:
        word = tl.load(at + slots, mask=inside, other=0)
    if dtype.primitive_bitwidth == 16:
        value = word.to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)
    else:
        value = word.to(tl.uint32).to(tl.float32, bitcast=True)
    return value


@triton.jit
def _keeps(x, inside, threshold):
    # "not <=" rather than ">": NaN must stay active.
    return inside & ((tl.abs(x) <= threshold) == 0)


@triton.jit
def _counted(read, LANES: tl.constexpr):
    """For each lane how many of the lanes before it are set, and how many of all."""
    if INTERPRETING:
        ones = read.to(tl.int32)
        before = tl.cumsum(ones, axis=0) - ones
        here = tl.zeros((LANES,), tl.int32) + tl.sum(ones, axis=0)
    else:  # each lane is a thread of every warp, whichever: there are no more lanes than threads
        before, here = tl.inline_asm_elementwise(
            """{
            .reg .pred set; .reg .b32 marks, below;
            setp.ne.b32 set, $2, 0;
            vote.sync.ballot.b32 marks, set, 0xffffffff;
            mov.u32 below, %lanemask_lt;
            and.b32 below, marks, below;
            popc.b32 $0, below;
            popc.b32 $1, marks;
            }""",
            "=r,=r,r",
            [read.to(tl.int32)],
            dtype=(tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )
    return before, here


@triton.jit
def _warp():
    """This thread's warp."""
    thread = tl.inline_asm_elementwise("mov.u32 $0, %tid.x;", "=r", [], dtype=tl.int32, is_pure=True, pack=1)
    return thread // 32


@triton.jit
def norm_weights(weight_ptr, begin, stop, INPUTS: tl.constexpr):
    """Of some vectors of inputs, a tuple; a layer norm's biases likewise."""
    LANES: tl.constexpr = INPUTS.lanes
    VECTORS: tl.constexpr = INPUTS.vectors
    at = weight_ptr + begin + tl.arange(0, LANES)  # from here to the other vectors is a constant in the instruction
    weights = ()
    for vector in tl.static_range(VECTORS):
        inside = lanes_inside(begin, stop, vector, LANES, INPUTS.full)
        weights = weights + (tl.load(at + vector * LANES, mask=inside, other=0.0),)
    return weights


@triton.jit
def no_biases(INPUTS: tl.constexpr):
    """Zeros in the place of those of `norm_weights`."""
    VECTORS: tl.constexpr = INPUTS.vectors
    LANES: tl.constexpr = INPUTS.lanes
    biases = ()
    for _ in tl.static_range(VECTORS):
        biases = biases + (tl.zeros((LANES,), tl.float32),)
    return biases


@triton.jit
def take_inputs(
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
    of_added,
    writes,
    entries,
    n_in,
    first,
    begin,
    stop,
    thresholds,
    SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    WARPS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """Inputs `begin` to `stop` of a program, whose own are from `first`: merged or normalised, listed, added up.

    A vector of inputs is as wide as a warp, and each warp takes all vectors: so a slot is found by counting
    bits of one word, and no warp waits for another before the end. The list begins at slot `begin - first`.
    What was merged, or normalised for the FMA path, and is read whole has all its inputs listed, each in its
    own slot. Where nothing is counted a vector is as wide as the program, or every warp would take 1,024 inputs of
    eight rows of partials in 16 steps, one after the other.

    Args:
        used: split-KV partials of the longest row.
        weights: of the norm, if the vectors are taken at once.
        biases: likewise, of a layer norm; zeros where it has none.
        means: of each row, for a layer norm.
        scales: of the norm, for each row.
        added_weights: of the norm of what is added first, as `weights`.
        added_scale: of that norm.
        of_added: what that is multiplied by before it is added.
        writes: whether this program writes the stream, after that.
        thresholds: of each row; none where nothing is listed.

    Returns:
        Entries of the list; inputs that were kept, of all rows together; for each row the sum of what was
        kept (of everything where nothing is dropped), 0 unless `SUMS`.
    """
    dtype = x_ptr.dtype.element_ty
    LANES: tl.constexpr = INPUTS.lanes
    VECTORS: tl.constexpr = INPUTS.vectors
    SLOTS: tl.constexpr = INPUTS.slots
    count = tl.zeros((LANES,), tl.int32)
    kept = tl.zeros((LANES,), tl.int32)
    sums = ()
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.zeros((LANES,), tl.float32),)
    steps = 1 if INPUTS.at_once else tl.cdiv(stop - begin, LANES * VECTORS)
    for step in range(steps):
        start = begin + step * (LANES * VECTORS)
        of_norm = weights
        to_add = biases
        of_added_norm = added_weights
        if INPUTS.norm and not INPUTS.at_once:
            of_norm = norm_weights(norm.weight, start, stop, INPUTS)
            if INPUTS.norm_centred:
                to_add = norm_weights(norm.bias, start, stop, INPUTS) if norm.bias is not None else no_biases(INPUTS)
        if INPUTS.added and not INPUTS.at_once:
            of_added_norm = norm_weights(added.weight, start, stop, INPUTS)
        raw = ()
        to_stream = ()
        if INPUTS.head_size > 0:
            raw = merged_partials(partials, used, n_in, start, stop, ROWS, INPUTS)
        else:  # all loads first: they are under way together
            at = x_ptr + start + tl.arange(0, LANES)
            for vector in tl.static_range(VECTORS):
                inside = lanes_inside(start, stop, vector, LANES, INPUTS.full)
                for row in tl.static_range(ROWS):
                    raw = raw + (tl.load(at + row * n_in + vector * LANES, mask=inside, other=0.0),)
                if INPUTS.added:
                    at_added = added.y + start + tl.arange(0, LANES) + vector * LANES
                    to_stream = to_stream + (tl.load(at_added, mask=inside, other=0.0),)
        for vector in tl.static_range(VECTORS):
            index = start - first + vector * LANES + tl.arange(0, LANES)
            inside = lanes_inside(start, stop, vector, LANES, INPUTS.full)
            values = ()
            read = inside
            if INPUTS.listed:
                read = inside & False
            for row in tl.static_range(ROWS):
                value = raw[vector * ROWS + row].to(tl.float32)
                if INPUTS.head_size > 0:
                    value = rounded(value, dtype)
                if INPUTS.added:
                    more = normalised(
                        to_stream[vector], added_scale, of_added_norm[vector], dtype, INPUTS.added_plus_one
                    )
                    value = rounded(value + rounded(more * of_added, dtype), dtype)
                    if writes:
                        at_stream = added.stream + start + vector * LANES + tl.arange(0, LANES)
                        tl.store(at_stream, value.to(dtype), mask=inside)
                if INPUTS.norm_centred:
                    value = layer_normalised(
                        value, means[row], scales[row], of_norm[vector], to_add[vector], dtype, INPUTS.norm_plus_one
                    )
                elif INPUTS.norm:
                    value = normalised(value, scales[row], of_norm[vector], dtype, INPUTS.norm_plus_one)
                if INPUTS.listed:
                    keep = _keeps(value, inside, thresholds[row])
                    read |= keep  # one row of weights serves every row of x
                    if ROWS > 1:
                        kept += keep.to(tl.int32)
                    if ROWS > 1 or SUMS:  # at an infinite threshold an infinity is dropped: it must not meet a weight
                        value = tl.where(keep, value, 0.0)
                values = values + (value,)
            if SUMS:
                more_sums = ()
                for row in tl.static_range(ROWS):
                    more_sums = more_sums + (sums[row] + values[row],)
                sums = more_sums
            stored = read
            if (
                INPUTS.shared_bytes > 0 and LANES < 32 * WARPS
            ):  # all warps hold a vector, and take turns; else Triton sees to that
                stored &= _warp() == vector % WARPS
            if INPUTS.listed:
                before, here = _counted(read, LANES)
                for row in tl.static_range(ROWS):
                    slots = row * SLOTS + begin - first + count + before
                    put(entries, slots, index, values[row], stored, dtype, INPUTS.shared_bytes)
                count += here
            elif INPUTS.taken:
                for row in tl.static_range(ROWS):
                    put(entries, row * SLOTS + index, index, values[row], stored, dtype, INPUTS.shared_bytes)
    count = tl.max(count, axis=0)  # the same in every lane
    active = count
    if ROWS > 1:
        active = tl.sum(kept, axis=0)
    totals = ()
    for row in tl.static_range(ROWS):
        totals = totals + (tl.sum(sums[row], axis=0) if SUMS else 0.0,)
    return count, active, totals
