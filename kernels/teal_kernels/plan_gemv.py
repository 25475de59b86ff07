"""How one product is launched: its grid and every compile-time constant, from sizes alone.

Pure functions: no tensor is needed, and no device, whose facts are `DeviceFacts`. `triton_gemv` launches.
The constants of the kernel are three groups (`TileConstants`, `InputConstants`, `EpilogueConstants`):
Triton takes each as one argument, and the kernel reads them by the names that they have here.

Importable without triton.
"""

from dataclasses import dataclass
from functools import lru_cache

from teal_kernels.launching import FIRST_PARTIALS, LEAST_TILE, DeviceFacts, power_of_two, uses_fma
from teal_kernels.plan_constants import EpilogueConstants, InputConstants, TileConstants

MAX_ROWS = 8
"""Rows of a batch that one launch takes: each program lists the inputs of all."""
MAX_LISTED = 1 << 15
"""Inputs that one program can list: an index has 15 bits."""
_MAX_ELEMENTS = (1 << 31) - 1
"""Between a program's first row and its last, and of all partial sums: offsets have 32 bits."""
_MAX_LIST_BYTES = 16384
"""Of a list in shared memory, so that several programs fit a multiprocessor."""
_MAX_SHARED_BYTES = 49152
"""Of a program's shared memory with a list, which Triton does not know of: beyond so much a launch must ask."""
_WARP = 32
_MAX_VECTORS = 16
"""Vectors of inputs that a warp holds, of all rows together."""
_MAX_VECTORS_OF_PARTIALS = 32
"""The same of split-KV partials before they are merged: of each as many as are read at a time."""
_MAX_SUMS = 32
"""Of a thread, for each of two rows on the FMA path."""
_MAX_REDUCERS = 4
"""Of one block. More were no faster on an H100."""
_GATHERED_REGISTERS = 32
"""The gathering of partial sums must not need more registers than the loop over weights does."""
EPILOGUES = {"plain": 0, "activated": 0, "residual": 1, "gated": 2, "beside": 3, "paired": 4}
"""What follows a product, by the number that the kernel knows it by."""


@dataclass(frozen=True)
class TileConfig:
    """How one product is divided: what is tuned."""

    block_out: int
    """Outputs of a program (power of two)."""
    block_in: int
    """Rows of weights in a tile (power of two); on tensor cores at least 16, with as much less in flight."""
    unroll: int
    """Tiles in flight at a time."""
    inputs_per_chunk: int
    """Inputs of a program, which are one split-K chunk; with a list at most `MAX_LISTED`."""
    warps: int
    dense: bool = False
    """Read every row, and do not list."""
    evict_first: bool = True
    """Let the weights leave the L2 cache before anything else does."""


@dataclass(frozen=True)
class ProductShape:
    """The sizes of one product."""

    rows: int
    """Of the batch."""
    inputs: int
    parts: tuple[int, ...]
    """Outputs of each projection in the table."""
    itemsize: int
    """Bytes of an input."""
    bits: int
    """Of a weight: of its code where weights are quantised."""
    group: int
    """Inputs that share a scale; all of them where weights are not quantised."""
    row_stride: int
    """Elements from one row of the table to the next."""
    epilogue: str = "plain"
    norm_squares: int = 0
    """Partial sums of squares that a norm in front reads for each row; 0 without one."""
    no_norm: bool = False  # whether they are read for what is `added`, and no norm follows
    norm_plus_one: bool = False  # whether that norm multiplies by 1 + weight
    norm_centred: bool = False  # whether it is a layer norm
    activation: int = 0
    """Of the epilogue: one of `launching.ACTIVATIONS`."""
    scaled: bool = False  # what `residual` adds
    sums: bool = False  # whether that writes partial sums of its results, too, for a layer norm
    added: bool = False  # whether inputs are a stream to which the norm of something is added first
    added_plus_one: bool = False
    beside_plus_one: bool = False  # of the norm behind the epilogue `beside`
    head_size: int = 0
    """Of the attention whose split-KV partials are the inputs; 0 where inputs are plain."""
    splits: int = 0
    """Of the KV cache at most, where inputs are split-KV partials."""
    split_multiple: int = 1
    """Positions that a split of the KV cache is a multiple of."""
    own_thresholds: bool = False  # of each row
    side_by_side: int = 1
    """Products of these sizes, each with a table of its own, that one launch computes (`experts`)."""
    summed: int = 1
    """Tables of these sizes whose products are summed to one."""

    @property
    def fma(self) -> bool:
        """Whether it runs on the FMA path."""
        return uses_fma(self.rows, self.bits)


@dataclass(frozen=True)
class ProductPlan:
    """One launch."""

    grid: tuple[int, int]
    """Blocks of outputs, split-K chunks."""
    tile: TileConstants
    inputs: InputConstants
    epilogue: EpilogueConstants
    partial_sums: int
    """Words of memory for partial sums."""
    list_entries: int
    """Of all lists in global memory; 0 where there are none."""

    @property
    def squares(self) -> int:
        """Partial sums of squares that a `residual` epilogue writes of each row; or of all, side by side."""
        return self.grid[0] * self.epilogue.reducers


@lru_cache(maxsize=4096)  # planning takes several times as long as the rest of a launch
def plan_product(
    shape: ProductShape, config: TileConfig, device: DeviceFacts, *, exclusive_device: bool = True
) -> ProductPlan:
    """Plan one launch. Remembered.

    Args:
        shape: what is multiplied.
        config: how it is divided.
        device: where.
        exclusive_device: as `triton_gemv.gemv` has it.

    Raises:
        ValueError: it cannot be launched so.
    """
    _check(shape, config)
    rows, chunk = shape.rows, config.inputs_per_chunk
    blocks, chunks = _blocks(shape, config), -(-shape.inputs // chunk) * shape.summed
    partial_sums = chunks * rows * blocks * config.block_out
    if partial_sums > _MAX_ELEMENTS:
        raise ValueError(f"{chunks} times {rows} rows of {sum(shape.parts)} partial sums are more than {_MAX_ELEMENTS}")
    reducers = reducers_of(shape, config, device) if exclusive_device else 1
    inputs = _input_constants(shape, config, device)
    in_memory = inputs.taken and inputs.shared_bytes == 0
    return ProductPlan(
        grid=(blocks, chunks),
        tile=_tile_constants(shape, config),
        inputs=inputs,
        epilogue=_epilogue_constants(shape, config, chunks, reducers),
        partial_sums=partial_sums,
        list_entries=blocks * chunks * inputs.capacity * rows if in_memory else 0,
    )


def squares_of(shape: ProductShape, config: TileConfig, device: DeviceFacts) -> int:
    """As `ProductPlan.squares` of a launch that has the device for itself."""
    return _blocks(shape, config) * reducers_of(shape, config, device)


def reducers_of(shape: ProductShape, config: TileConfig, device: DeviceFacts) -> int:
    """Programs that share the epilogue of one block, a power of two: they wait for each other, so all run at once."""
    most = min(
        device.multiprocessors * _resident(shape, config, device) // _blocks(shape, config),
        -(-shape.inputs // config.inputs_per_chunk) * shape.summed,
        config.block_out // 32,
        _MAX_REDUCERS,
    )
    return 1 << max(0, most.bit_length() - 1)


def _check(shape: ProductShape, config: TileConfig) -> None:
    parts, group, chunk = shape.parts, shape.group, config.inputs_per_chunk
    if shape.rows > MAX_ROWS:
        raise ValueError(f"{shape.rows} rows are more than the {MAX_ROWS} that one launch takes")
    if len(parts) > 3 or (shape.epilogue == "gated" and (len(parts) != 2 or parts[0] != parts[1])):
        raise ValueError(f"a table of parts {parts} is not for a {shape.epilogue} product")
    if shape.epilogue == "paired" and (len(parts) > 1 or parts[0] % 2 or shape.rows > 1):
        raise ValueError(f"a paired product has one row and one even part, not {shape.rows} and {parts}")
    if shape.bits < 16 and config.block_out * shape.bits < 32:
        raise ValueError(f"parts {parts} in blocks of {config.block_out} do not fit words of {shape.bits} bits")
    if group < shape.inputs:
        if chunk % group if chunk > group else group % chunk:
            raise ValueError(f"chunks of {chunk} inputs and groups of {group}: one must divide the other")
        if chunk > group and group % 32:
            raise ValueError(f"a chunk cannot have several groups of {group} inputs: that is no multiple of 32")
    if not config.dense and chunk > MAX_LISTED:
        raise ValueError(f"a program lists at most {MAX_LISTED} inputs, not {chunk}")
    if min(chunk, shape.inputs) * shape.row_stride > _MAX_ELEMENTS:
        raise ValueError(f"a program reads at most {_MAX_ELEMENTS} elements of a table: {shape.inputs} rows are more")


def _blocks(shape: ProductShape, config: TileConfig) -> int:
    return shape.side_by_side * sum(-(-part // config.block_out) for part in shape.parts)


def _tile(shape: ProductShape, config: TileConfig) -> tuple[int, int]:
    """Rows of weights in a tile, and tiles in flight, as this batch runs them."""
    if shape.rows == 1:
        return config.block_in, config.unroll
    if shape.fma:  # tiles for tensor cores would take more registers than there are
        return max(1, min(config.block_in, _MAX_SUMS * _WARP * config.warps // config.block_out)), config.unroll
    if config.block_in >= LEAST_TILE:
        return config.block_in, config.unroll
    return LEAST_TILE, max(1, config.unroll * config.block_in // LEAST_TILE)


def _tile_constants(shape: ProductShape, config: TileConfig) -> TileConstants:
    block_in, unroll = _tile(shape, config)
    pack = 32 // shape.bits if shape.bits < 16 else 1
    return TileConstants(
        block_out=config.block_out,
        block_in=block_in,
        unroll=unroll,
        warps=config.warps,
        evict="evict_first" if config.evict_first else "",
        bits=shape.bits,
        fma=shape.fma,
        pack=pack,
        words=config.block_out // pack,
    )


def _slots(shape: ProductShape, config: TileConfig) -> int:
    """Entries of a list in shared memory, for each row: as far as tiles reach that are read ahead."""
    block_in, unroll = _tile(shape, config)
    return power_of_two(config.inputs_per_chunk) + 2 * block_in * unroll


def _tiles_bytes(shape: ProductShape, config: TileConfig, sets: int) -> int:
    """Of a program's shared memory for tensor cores: so many sets of tiles in flight, and a tile of values."""
    if shape.fma:
        return 0
    block_in, unroll = _tile(shape, config)
    return block_in * (sets * unroll * config.block_out + LEAST_TILE) * shape.itemsize


def _list_bytes(shape: ProductShape, config: TileConfig, device: DeviceFacts) -> int:
    """Of a program's list in shared memory, if it has one; 0 where that lies in global memory."""
    needed = 0 if device.interpreter else shape.rows * _slots(shape, config) * 2 * shape.itemsize
    beside = _tiles_bytes(shape, config, sets=2) + 1024
    return needed if needed <= _MAX_LIST_BYTES and needed + beside <= _MAX_SHARED_BYTES else 0


def _resident(shape: ProductShape, config: TileConfig, device: DeviceFacts) -> int:
    """Programs that a multiprocessor holds at the least.

    Eight warps fit whatever registers they need. Of tiles in shared memory up to three sets lie there at a time.
    """
    needed = _list_bytes(shape, config, device) + _tiles_bytes(shape, config, sets=3) + 4096
    return max(1, min(8 // config.warps, device.shared_memory // needed))


def _lanes(chunk: int, config: TileConfig, device: DeviceFacts) -> int:
    """Inputs of a vector: as many as a warp has threads, where each warp counts all; else as a program has, if so many.

    The interpreter, slow at each step, takes all at once.
    """
    if device.interpreter:
        return chunk
    threads = _WARP * config.warps
    return threads if config.dense and chunk >= threads else _WARP


def _vectors_per_head(head_size: int, unit: int, lanes: int, vectors: int) -> int:
    """Vectors, one after the other, that surely lie in one head, of those taken at once from every `unit` of inputs."""
    span = lanes * vectors
    least = min(head_size, span)
    whole = head_size % lanes == 0 and max(head_size, span) % least == 0 and unit % least == 0
    return least // lanes if whole else 1


def _input_constants(shape: ProductShape, config: TileConfig, device: DeviceFacts) -> InputConstants:
    listed, chunk = not config.dense, config.inputs_per_chunk
    several = shape.group < shape.inputs and chunk > shape.group
    capacity = power_of_two(chunk)
    lanes = _lanes(capacity, config, device)
    # A power of two, so that steps of so many vectors end where a full chunk does.
    most = _MAX_VECTORS
    if shape.head_size:
        most = min(most, _MAX_VECTORS_OF_PARTIALS // power_of_two(min(FIRST_PARTIALS, shape.splits)))
    step = min(capacity, shape.group) if several else capacity
    vectors = max(1, min(step // lanes, most // power_of_two(shape.rows)))
    # Inputs of a batch that is read whole are normalised as tensor cores take tiles of them, and need no list.
    has_norm = shape.norm_squares > 0 and not shape.no_norm
    norm_in_tiles = has_norm and not shape.head_size and not listed and not shape.fma
    norm = has_norm and not norm_in_tiles
    shared_bytes = _list_bytes(shape, config, device)
    unit = shape.group if several else chunk
    return InputConstants(
        listed=listed,
        own_thresholds=shape.own_thresholds and listed,
        norm=norm,
        norm_in_tiles=norm_in_tiles,
        norm_plus_one=shape.norm_plus_one,
        norm_centred=shape.norm_centred,
        added=shape.added,
        added_plus_one=shape.added_plus_one,
        norm_squares=power_of_two(shape.norm_squares),
        taken=listed or norm or shape.added or shape.head_size > 0,
        several_groups=several,
        lanes=lanes,
        vectors=vectors,
        at_once=capacity <= lanes * vectors and not several,
        full=capacity % lanes == 0 and shape.inputs % capacity == 0 and capacity == chunk and not several,
        capacity=capacity,
        slots=_slots(shape, config) if shared_bytes else capacity,
        shared_bytes=shared_bytes,
        head_size=shape.head_size,
        splits=shape.splits,
        split_multiple=shape.split_multiple,
        vectors_per_head=_vectors_per_head(shape.head_size, unit, lanes, vectors) if shape.head_size else 1,
    )


def _epilogue_constants(shape: ProductShape, config: TileConfig, chunks: int, reducers: int) -> EpilogueConstants:
    batch = power_of_two(shape.rows)
    two = shape.epilogue in ("gated", "paired")
    threads, columns = _WARP * config.warps, batch * config.block_out // reducers
    if shape.epilogue == "paired":
        columns //= 2
    registers = _GATHERED_REGISTERS // (2 if two else 1)
    return EpilogueConstants(
        kind=EPILOGUES[shape.epilogue],
        two=two,
        activation=shape.activation,
        scaled=shape.scaled,
        sums=shape.sums,
        plus_one=shape.beside_plus_one,
        even=all(part % config.block_out == 0 for part in shape.parts),
        split=chunks > 1,
        reducers=reducers,
        gathered=max(1, threads // columns, min(power_of_two(chunks), registers * threads // columns)),
        batch=batch,
    )
