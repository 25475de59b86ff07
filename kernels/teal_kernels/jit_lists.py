"""Lists of the inputs that one program keeps. Triton's language, so not type-checked.

An entry is an index below 2**15 and a value, in one word of twice the value's size. A list lies in shared
memory, for which Triton has no words, so that is PTX: through global memory a program waits for the
L2 twice before it reads its first weight, to store its list and to load it. Lists too long for
that (`teal_kernels.triton_gemv`), and all in the interpreter, lie in global memory all the same.

Where a list begins is a pointer to words in global memory, or an address in shared memory as int32.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

from teal_kernels.jit_common import INTERPRETING


@triton.jit
def keeps(x, inside, threshold):
    """Which inputs are above the threshold."""
    # "not <=" rather than ">": NaN must stay active.
    return inside & ((tl.abs(x) <= threshold) == 0)


@triton.jit
def bits_set(x):
    """How many bits of each word are set."""
    x = x.to(tl.uint32)
    if INTERPRETING:  # it knows no functions of CUDA's library
        x = x - ((x >> 1) & 0x55555555)
        x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
        count = (((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24
    else:
        count = libdevice.popc(x.to(tl.int32, bitcast=True))
    return count.to(tl.int32)


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
