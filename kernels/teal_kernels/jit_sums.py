"""Sums of inputs times their rows of weights, of one program. Triton's language, so not type-checked."""

import triton
import triton.language as tl

from teal_kernels.jit_common import (
    INTERPRETING,
    LEAST_TILE,
    launch_dependents,
    layer_normalised,
    matmul,
    normalised,
)
from teal_kernels.jit_lists import listed_index, listed_value


@triton.constexpr_function
def _lowest_bit(k, bits, dtype):
    """The bit of a float32, below its leading one, at which the k-th code of a word is multiplied.

    The higher, the less rounding takes of a product: 2e-7 (int8) and 1e-7 (int4) at the highest. Inputs of 16 bits
    forgive 4e-5: there bytes lie where one permutation puts them, and half bytes, two by two, where one shift does.
    """
    if dtype.primitive_bitwidth > 16:
        return 23 - bits
    return 8 if bits == 8 else 16 - k % 2 * 4


@triton.constexpr_function
def _tiles(rows, fma):
    """Tiles of sums for each weight of a word: one for each row on the FMA path, or one of all rows."""
    return rows if fma else 1


@triton.jit
def _one():
    """The bits of 1.0, float32, in a register of whose value the compiler knows nothing (no lane has an empty mask).

    What it knows it puts in place before each use: 65 more instructions to the 207 of a loop over int8 (sm_90).
    """
    one = 0x3F800000
    if not INTERPRETING:
        one = tl.inline_asm_elementwise(
            "{ .reg .pred none; mov.u32 $0, %lanemask_eq; setp.eq.u32 none, $0, 0; selp.b32 $0, 0, $1, none; }",
            "=&r,r",
            [one],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return one


@triton.jit
def _code_after_one(words, one, k: tl.constexpr, dtype: tl.constexpr, BITS: tl.constexpr):
    """1 + u / 2**(23 - lowest_bit), float32, of the k-th code u of each word: u lies below the leading bit of `one`.

    A shift, and one instruction that masks and sets the exponent; for a byte one that does all. (Without being told,
    the compiler makes two of the one, and a conversion of u runs at a fraction of their rate.)
    """
    lowest_bit: tl.constexpr = _lowest_bit(k, BITS, dtype)
    at: tl.constexpr = k * BITS
    mask: tl.constexpr = ((1 << BITS) - 1) << lowest_bit
    moved = words << (lowest_bit - at) if at <= lowest_bit else words >> (at - lowest_bit)
    if INTERPRETING:
        bits = moved & mask | one
    elif BITS == 8 and lowest_bit == 8:
        bits = tl.inline_asm_elementwise(
            f"prmt.b32 $0, $1, $2, {0x7604 + 16 * k};", "=r,r,r", [words, one], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        bits = tl.inline_asm_elementwise(
            f"lop3.b32 $0, $1, {mask}, $2, 0xEA;", "=r,r,r", [moved, one], dtype=tl.int32, is_pure=True, pack=1
        )
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _unpacked(words, one, k: tl.constexpr, dtype: tl.constexpr, TILE: tl.constexpr):
    """The k-th weight of each word, as what is multiplied; of quantised weights their codes.

    On the FMA path `_code_after_one` of a code u is multiplied (`scaled_sums` takes it back), on tensor cores u
    itself: 2**23 + u less 2**23, sooner than a conversion. (Plain arithmetic: Triton gives its words the layout of
    tensor cores beforehand. With PTX in between it would have to give it to each tile of weights.)
    """
    if TILE.bits >= 16:
        value = words
        if TILE.fma:
            value = words.to(tl.float32)
    elif TILE.fma:
        value = _code_after_one(words, one, k, dtype, TILE.bits)
    else:
        bits = words >> (k * TILE.bits) & ((1 << TILE.bits) - 1) | 0x4B000000
        value = (bits.to(tl.float32, bitcast=True) - 8388608.0).to(dtype)
    return value


@triton.jit
def group_factors(table, start, columns, out_stop, TILE: tl.constexpr):
    """Scales and zero points of one group of inputs: for each weight of a word those of its outputs, (words,) float32.

    Args:
        start: where the group's begin.
        columns: the output of each word's first weight.
    """
    PACK: tl.constexpr = TILE.pack
    WORDS: tl.constexpr = TILE.words
    factors = ()
    zeros = ()
    for k in tl.static_range(PACK):
        inside = columns + k < out_stop
        factors = factors + (tl.load(table.scales + start + columns + k, mask=inside, other=0.0).to(tl.float32),)
        zero = tl.full((WORDS,), 1 << (TILE.bits - 1), tl.float32)
        if table.zeros is not None:
            zero = tl.load(table.zeros + start + columns + k, mask=inside, other=0).to(tl.float32)
        zeros = zeros + (zero,)
    return factors, zeros


@triton.jit
def scaled_sums(acc, sums, x_sums, factors, zeros, dtype: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):
    """The sums before, and those of one group: of x (code - zero) scale = scale (sum of x code - zero sum of x).

    Args:
        x_sums: for each tile of sums of one weight of a word. On tensor cores there is one: (LEAST_TILE, 1), for each
            row. On the FMA path there is one for each row: its share of each row of the tile, which are added up in
            the end.
    """
    PACK: tl.constexpr = TILE.pack
    tiles: tl.constexpr = _tiles(ROWS, TILE.fma)
    added = ()
    for k in tl.static_range(PACK):
        factor = factors[k]
        zero = zeros[k]
        if TILE.fma:  # for the values of `_unpacked`
            unit = 1 << (23 - _lowest_bit(k, TILE.bits, dtype))
            factor = factor * unit
            zero = 1.0 + zero / unit
        for tile in tl.static_range(tiles):
            scaled = factor[None, :] * (sums[k * tiles + tile] - zero[None, :] * x_sums[tile])
            added = added + (acc[k * tiles + tile] + scaled,)
    return added


@triton.jit
def no_sums(ROWS: tl.constexpr, TILE: tl.constexpr):
    """For each weight of a word a tile of zeros, float32; on the FMA path one for each row, side by side."""
    height: tl.constexpr = TILE.block_in if TILE.fma else LEAST_TILE
    words: tl.constexpr = TILE.words
    acc = ()
    tiles: tl.constexpr = TILE.pack * _tiles(ROWS, TILE.fma)
    for _ in tl.static_range(tiles):
        acc = acc + (tl.zeros((height, words), dtype=tl.float32),)
    return acc


@triton.jit
def bias_of_words(bias_ptr, columns, stop, TILE: tl.constexpr):
    """For each weight of a word the biases of its outputs, (words,) float32; 0 from output `stop` on.

    Args:
        columns: the output of each word's first weight.
    """
    PACK: tl.constexpr = TILE.pack
    biases = ()
    for k in tl.static_range(PACK):
        biases = biases + (tl.load(bias_ptr + columns + k, mask=columns + k < stop, other=0.0).to(tl.float32),)
    return biases


@triton.jit
def columns_of_pairs(slice_of_block, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """Where a block's sums lie whose outputs are gate and up by turns.

    (WIDTH / 2,) each of gates and of ups, and which pair of the block it is.

    The block is in slices of WIDTH. Of words the sums of one weight lie before those of the next.
    """
    HALF: tl.constexpr = TILE.block_out // 2
    WORDS: tl.constexpr = TILE.words
    PAIRS: tl.constexpr = TILE.pack // 2  # of a word
    slice_pairs: tl.constexpr = WIDTH // 2
    pair = slice_of_block * slice_pairs + tl.arange(0, slice_pairs)
    which = pair
    gates = 2 * pair
    ups = gates + 1
    if PAIRS > 0:
        which = pair * PAIRS % HALF + pair * PAIRS // HALF
        gates = pair + pair // WORDS * WORDS
        ups = gates + WORDS
    return gates, ups, which


@triton.jit
def _added(acc, values, words, one, dtype: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):
    """The sums, and values times a tile of weights.

    One row, and two of codes, are multiplied by FMA instructions (`uses_fma`), and their tiles added up at the end:
    16 instructions for 16 bytes of weights and one row. More rows are what tensor cores are for, but codes must first
    be made weights of 16 bits and brought to where those take them.
    """
    PACK: tl.constexpr = TILE.pack
    tiles: tl.constexpr = _tiles(ROWS, TILE.fma)
    added = ()
    for k in tl.static_range(PACK):
        weights = _unpacked(words, one, k, dtype, TILE)
        for tile in tl.static_range(tiles):
            total = acc[k * tiles + tile]
            if TILE.fma:
                total += values[tile] * weights
            else:
                total = matmul(values[tile], weights, total)
            added = added + (total,)
    return added


@triton.jit
def _listed_rows(entries, begin, stop, dtype: tl.constexpr, TILE: tl.constexpr, SHARED: tl.constexpr):
    """For each tile from slot `begin` the rows of weights that a list names, a tuple."""
    BLOCK_IN: tl.constexpr = TILE.block_in
    UNROLL: tl.constexpr = TILE.unroll
    which = ()
    for step in tl.static_range(UNROLL):
        slots = begin + step * BLOCK_IN + tl.arange(0, BLOCK_IN)
        which = which + (listed_index(entries, slots, slots < stop, dtype, SHARED),)
    return which


@triton.jit
def load_rows(columns, inside, which, begin, stop, stride, LISTED: tl.constexpr, TILE: tl.constexpr):
    """Tiles of weights, a tuple: of slots from `begin`, as far as they are before `stop`, the rows `which` that a list
    names, or without one the rows of the same number."""
    BLOCK_IN: tl.constexpr = TILE.block_in
    UNROLL: tl.constexpr = TILE.unroll
    weights = ()
    for step in tl.static_range(UNROLL):
        slots = begin + step * BLOCK_IN + tl.arange(0, BLOCK_IN)
        rows = which[step] if LISTED else slots
        weights = weights + (
            tl.load(
                columns[None, :] + (rows * stride)[:, None],
                mask=(slots < stop)[:, None] & inside[None, :],
                other=0,
                eviction_policy=TILE.evict,
            ),
        )
    return weights


@triton.jit
def sum_rows(
    columns,
    inside,
    ahead,
    x_ptr,
    norm,
    means,
    scales,
    n_in,
    first,
    entries,
    begin,
    stop,
    stride,
    dtype: tl.constexpr,
    AHEAD: tl.constexpr,
    LAUNCH_DEPENDENTS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """Inputs times their rows of weights: for each weight of a word a tile of sums, or one for each row (`no_sums`).
    And the sums of the inputs that tensor cores multiply with codes, (LEAST_TILE,) of rows; else 0.

    Those of slots `begin` to `stop` of the list, or without one inputs `begin` to `stop` of the chunk, whose first is
    `first` and whose weights begin at `columns`; their values are in their slots if they were `taken`. What tensor
    cores take is normalised here with `norm_in_tiles`, by the `scales` of `rms_scales`. With AHEAD, and no list, the
    first tiles, `ahead`, are under way already. With LAUNCH_DEPENDENTS the next kernel may begin when the last are
    asked for.
    """
    x_ptr += first
    norm_ptr = x_ptr
    if INPUTS.norm_in_tiles:
        norm_ptr = norm.weight + first
    BLOCK_IN: tl.constexpr = TILE.block_in
    UNROLL: tl.constexpr = TILE.unroll
    SHARED: tl.constexpr = INPUTS.shared_bytes
    rows = tl.arange(0, LEAST_TILE)
    in_rows = rows < ROWS
    tile = tl.arange(0, BLOCK_IN)
    acc = no_sums(ROWS, TILE)
    seen = tl.zeros((LEAST_TILE, BLOCK_IN), tl.float32)
    one = _one()
    which = ()
    if INPUTS.listed:
        which = _listed_rows(entries, begin, stop, dtype, TILE, SHARED)
    for start in range(begin, stop, BLOCK_IN * UNROLL):
        following = start + BLOCK_IN * UNROLL
        if LAUNCH_DEPENDENTS:
            launch_dependents(following >= stop)
        weights = ahead
        if not AHEAD:
            weights = load_rows(columns, inside, which, start, stop, stride, INPUTS.listed, TILE)
        if INPUTS.listed:  # the next indices travel while these weights do
            which = _listed_rows(entries, following, stop, dtype, TILE, SHARED)
        for step in tl.static_range(UNROLL):
            slots = start + step * BLOCK_IN + tile
            values = ()
            if TILE.fma:
                for row in tl.static_range(ROWS):
                    if INPUTS.taken:
                        value = listed_value(entries, row * INPUTS.slots + slots, slots < stop, dtype, SHARED)
                    else:
                        value = tl.load(x_ptr + row * n_in + slots, mask=slots < stop, other=0.0).to(tl.float32)
                    values = values + (value[:, None],)
            else:
                there = in_rows[:, None] & (slots < stop)[None, :]
                if INPUTS.taken:
                    of_rows = tl.where(in_rows, rows, 0)[:, None] * INPUTS.slots + slots[None, :]
                    value = listed_value(entries, of_rows, there, dtype, SHARED).to(dtype)
                else:
                    value = tl.load(x_ptr + rows[:, None] * n_in + slots[None, :], mask=there, other=0.0)
                    if INPUTS.norm_in_tiles:
                        of_norm = tl.load(norm_ptr + slots, mask=slots < stop, other=0.0)
                        if INPUTS.norm_centred:
                            to_add = tl.zeros((BLOCK_IN,), tl.float32)
                            if norm.bias is not None:
                                to_add = tl.load(norm.bias + first + slots, mask=slots < stop, other=0.0)
                            value = layer_normalised(
                                value,
                                means[:, None],
                                scales[:, None],
                                of_norm[None, :],
                                to_add[None, :],
                                dtype,
                                INPUTS.norm_plus_one,
                            ).to(dtype)
                        else:
                            value = normalised(
                                value, scales[:, None], of_norm[None, :], dtype, INPUTS.norm_plus_one
                            ).to(dtype)
                if TILE.bits < 16:
                    seen += value.to(tl.float32)
                values = (value,)
            acc = _added(acc, values, weights[step], one, dtype, ROWS, TILE)
        if AHEAD:
            ahead = load_rows(columns, inside, which, following, stop, stride, INPUTS.listed, TILE)
    return acc, tl.sum(seen, axis=1)
