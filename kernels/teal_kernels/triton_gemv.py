"""Triton backend: one decoded token's matrix-vector product that reads only the rows that matter.

The weight is an input-major table (in, out): one row per input. A program owns a block of outputs
and a stretch of the inputs. It lists the inputs of its stretch that are above the threshold, adds
up their rows in float32 and sends one line of partial sums to memory. The programs of the last
stretches then finish the block, a slice each: they wait until every line has come and add the
lines in a fixed order, so there is no second launch, no output to clear and no floating-point
atomic, and the same inputs give the same bits on every run. A word that has not come holds the
bits of a NaN that no arithmetic makes, so the words need no counter and no fence beside them: on
an H100 that is 1 to 2 microseconds a product less than a counter of arrivals.

Around the product the kernel takes up what would otherwise be launches of their own: before it the
RMS norm (`NORM`) or the merging of attention's heads (`AttentionPartials`), after it the bias, the residual sum
with its sum of squares (`RESIDUAL`) or the gated activation (`GATED`). Several projections that read
one hidden state are parts of one table, each with its own threshold.

Importable without triton; without a GPU it runs under TRITON_INTERPRET=1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from teal_kernels.launching import (
    EMPTY,
    FIRST_LINES,
    LEAST_TILE,
    TRITON_MISSING,
    by_elements,
    interpreting,
    launch,
    power_of_two,
    resident,
    shared_memory,
)
from teal_kernels.packing import Packed, bits_of

if TRITON_MISSING is None:
    from teal_kernels.jit_gemv import gemv_kernel


@dataclass(frozen=True)
class TileConfig:
    """How one product is cut up."""

    block_out: int
    """Outputs of a program (power of two)."""
    block_in: int
    """Rows of weights in a tile (power of two); on matrix units at least 16, with as much less in flight."""
    unroll: int
    """Tiles in flight at a time."""
    inputs_per_chunk: int
    """Inputs of a program; with a list at most `MAX_LISTED`."""
    warps: int
    dense: bool = False
    """Read every row, and do not list."""
    evict_first: bool = True
    """Let the weights leave the L2 cache before anything else does."""


class Scratch:
    """Scratch memory that kernels share, one after the other on one stream.

    Places for partial sums are empty between launches: who takes the sums empties them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._tensors: dict[str, Tensor] = {}
        self._replaced: list[Tensor] = []  # a captured graph may hold their addresses

    def tensor(self, name: str, elements: int, dtype: torch.dtype, fill: int | None = None) -> Tensor:
        """A tensor of at least that many elements, filled when it is made if `fill` is given."""
        held = self._tensors.get(name)
        if held is None or held.numel() < elements or held.dtype != dtype:
            if held is not None:
                self._replaced.append(held)
            held = torch.empty(elements, dtype=dtype, device=self.device)
            self._tensors[name] = held if fill is None else held.fill_(fill)
        return held


@dataclass(frozen=True)
class Norm:
    """An RMS norm in front of a product."""

    weight: Tensor
    """(in,)"""
    eps: float
    squares: Tensor
    """(rows, n) float32: partial sums of the squares of x, from the kernel that wrote x."""


@dataclass(frozen=True)
class AttentionPartials:
    """What attention leaves for the product after it: for each query head a line for each stretch of the cache.

    That product merges the lines as it reads them. Were they merged by attention, its programs would wait for
    one another with nothing to read: 2 of its 6 microseconds on an H100, at any length of the context.
    """

    sums: Tensor
    """(lines, rows, heads D) float32: weighted averages of values."""
    logs: Tensor
    """(lines, rows, heads) float32: logarithms, to the base of 2, of the sums of the weights."""
    positions: Tensor
    """(rows,) int32: of each row's token. How many lines the row has follows from it; the others are not read."""
    window: int = 0
    """Positions that are seen, the new one included; 0 for all."""
    shortest: int = 64
    """A stretch is a multiple of so many positions."""

    def __post_init__(self) -> None:
        if self.positions.shape != self.sums.shape[1:2]:
            raise ValueError(f"{self.sums.shape[1]} rows need as many positions, not {tuple(self.positions.shape)}")

    @property
    def splits(self) -> int:
        """Stretches at most."""
        return self.sums.shape[0]

    @property
    def head_size(self) -> int:
        """D."""
        return self.sums.shape[2] // self.logs.shape[2]

    @classmethod
    def empty(
        cls, rows: int, heads: int, dim: int, splits: int, positions: Tensor, **options: int
    ) -> "AttentionPartials":
        """Not written yet."""
        sums = torch.empty(splits, rows, heads * dim, dtype=torch.float32, device=positions.device)
        return cls(sums, sums.new_empty(splits, rows, heads), positions, **options)


# The gathering of partial sums must not need more registers than the loop over weights does.
_GATHERED_REGISTERS = 32
MAX_LISTED = 1 << 15
"""Inputs that one program can list: an index has 15 bits."""
_MOST_ELEMENTS = (1 << 31) - 1
"""Between a program's first row and its last, and of all partial sums: offsets have 32 bits."""
_MOST_LIST_BYTES = 16384
"""Of a list in shared memory, so that several programs fit a multiprocessor."""
_MOST_SHARED_BYTES = 49152
"""Of a program's shared memory with a list, which Triton does not know of: beyond so much a launch must ask."""
_WARP = 32
_MOST_TAKEN = 16
"""Lines of inputs that a warp holds, of all rows together."""
_MOST_TAKEN_OF_HEADS = 32
"""The same of attention's heads before they are merged: of each as many lines as are read at a time."""
_MOST_SUMS = 32
"""Of a thread, for each of two rows that are multiplied element by element."""
MAX_ROWS = 8
"""Rows of a batch that one launch takes: each program lists the inputs of all."""
_MOST_FINISHERS = 4
"""Of one block. More were no faster on an H100."""
_EPILOGUES = {"plain": 0, "residual": 1, "gated": 2}


def _tile(config: TileConfig, rows: int, bits: int) -> tuple[int, int]:
    """Rows of weights in a tile, and tiles in flight, as this batch runs them."""
    if rows == 1:
        return config.block_in, config.unroll
    if by_elements(rows, bits):  # a cut for matrix units would take more registers than there are
        return max(1, min(config.block_in, _MOST_SUMS * _WARP * config.warps // config.block_out)), config.unroll
    if config.block_in >= LEAST_TILE:
        return config.block_in, config.unroll
    return LEAST_TILE, max(1, config.unroll * config.block_in // LEAST_TILE)


def _slots(config: TileConfig, rows: int, bits: int) -> int:
    """Entries of a list in shared memory, for each row: as far as tiles reach that are read ahead."""
    block_in, unroll = _tile(config, rows, bits)
    return power_of_two(config.inputs_per_chunk) + 2 * block_in * unroll


def _tiles_bytes(config: TileConfig, rows: int, bits: int, itemsize: int, sets: int) -> int:
    """Of a program's shared memory for matrix units: so many sets of tiles in flight, and a tile of values."""
    if by_elements(rows, bits):
        return 0
    block_in, unroll = _tile(config, rows, bits)
    return block_in * (sets * unroll * config.block_out + LEAST_TILE) * itemsize


def _list_bytes(config: TileConfig, rows: int, bits: int, itemsize: int) -> int:
    """Of a program's list in shared memory, if it has one; 0 where that lies in global memory."""
    needed = 0 if interpreting() else rows * _slots(config, rows, bits) * 2 * itemsize
    beside = _tiles_bytes(config, rows, bits, itemsize, sets=2) + 1024
    return needed if needed <= _MOST_LIST_BYTES and needed + beside <= _MOST_SHARED_BYTES else 0


def _fitting(device: torch.device, config: TileConfig, rows: int, bits: int, itemsize: int) -> int:
    """Programs that a multiprocessor holds at the least.

    Eight warps fit whatever registers they need. Of tiles in shared memory up to three sets lie there at a time.
    """
    fitting = max(1, 8 // config.warps)
    if device.type == "cuda":
        needed = _list_bytes(config, rows, bits, itemsize) + _tiles_bytes(config, rows, bits, itemsize, sets=3) + 4096
        fitting = max(1, min(fitting, shared_memory(device) // needed))
    return fitting


def _finishers(
    table: Tensor | Packed, parts: tuple[int, ...], config: TileConfig, rows: int, dtype: torch.dtype
) -> int:
    """Programs that share the end of one block.

    They wait for one another, so all must run at one time; nothing else of ours runs beside them
    (one stream a device).
    """
    fitting = _fitting(table.device, config, rows, bits_of(table), dtype.itemsize)
    most = min(
        resident(table.device, fitting) // _blocks(parts, config),
        -(-table.shape[0] // config.inputs_per_chunk),
        config.block_out // 32,
        _MOST_FINISHERS,
    )
    return 1 << max(0, most.bit_length() - 1)


def _blocks(parts: tuple[int, ...], config: TileConfig) -> int:
    return sum(-(-part // config.block_out) for part in parts)


def squares_of(
    table: Tensor | Packed, parts: tuple[int, ...], config: TileConfig, rows: int, dtype: torch.dtype
) -> int:
    """Partial sums of squares that a `residual` product of a batch of `rows` in `dtype` writes for each row."""
    return _blocks(parts, config) * _finishers(table, parts, config, rows, dtype)


def _lanes(stretch: int, config: TileConfig) -> int:
    """Inputs of a line: as many as a warp has threads, where each warp counts all; else as a program has, if so many.

    The interpreter, slow at each step, takes all at once.
    """
    if interpreting():
        return stretch
    threads = _WARP * config.warps
    return threads if config.dense and stretch >= threads else _WARP


def _alike(head_size: int, piece: int, lanes: int, taken: int) -> int:
    """Lines of inputs one after the other that surely lie in one head, of those taken at once from pieces of inputs."""
    span = lanes * taken
    unit = min(head_size, span)
    whole = head_size % lanes == 0 and max(head_size, span) % unit == 0 and piece % unit == 0
    return unit // lanes if whole else 1


def gemv(
    x: Tensor | AttentionPartials,
    table: Tensor | Packed,
    parts: tuple[int, ...],
    thresholds: Tensor,
    y: Tensor,
    config: TileConfig,
    scratch: Scratch,
    *,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    epilogue: str = "plain",
    squares: Tensor | None = None,
    counts: Tensor | None = None,
    pdl: bool = False,
    alone: bool = True,
    compile_only: bool = False,
) -> None:
    """One launch: norm, threshold, product and what follows it.

    Args:
        x: (rows, in), contiguous, rows from 1 to 8; or heads of attention, rounded to the dtype of y.
        table: (in, out), each row contiguous; the dtype of y. Or quantised.
        parts: outputs of each projection in the table, at most three.
        thresholds: (parts,) float32: inputs with |x| <= threshold are dropped; below zero none is.
        y: (rows, out), written. With `residual` it is added to; with `gated` it is (rows, out / 2).
        config: how the product is cut up.
        scratch: memory between programs, and the lists.
        bias: (out,) or None.
        norm: an RMS norm of x before all else.
        epilogue: `plain`; `residual`: y += product; `gated`: y = silu(first part) * second part.
        squares: (rows, `squares_of`) float32, written by `residual`: partial sums of y's squares.
        counts: (parts,) int64: how many inputs were kept is added to it.
        pdl: launch while the kernel before still runs. That one must not write table, thresholds, norm
            weight or the positions of partials, which are read before the wait for it.
        alone: no other stream of this process launches products meanwhile. False finishes a block in
            one program, which waits for none that begins after it.
        compile_only: compile what would be launched.

    Raises:
        ValueError: too many rows, or `parts`, `squares` or `config` does not fit.
    """
    partials: AttentionPartials | None = None
    rows, n_in = x.sums.shape[1:] if isinstance(x, AttentionPartials) else x.shape
    if isinstance(x, AttentionPartials):
        partials, x = x, y  # of x the kernel then takes the dtype only
    if rows > MAX_ROWS:
        raise ValueError(f"{rows} rows are more than the {MAX_ROWS} that one launch takes")
    if len(parts) > 3 or (epilogue == "gated" and (len(parts) != 2 or parts[0] != parts[1])):
        raise ValueError(f"a table of parts {parts} is not for a {epilogue} product")
    weights = table.words if isinstance(table, Packed) else table
    bits, group = bits_of(table), table.group if isinstance(table, Packed) else n_in
    if isinstance(table, Packed) and (table.parts != parts or config.block_out * bits < 32):
        raise ValueError(f"parts {parts} in blocks of {config.block_out} do not fit a table of parts {table.parts}")
    per_split = config.inputs_per_chunk
    several = per_split > group
    if group < n_in and (per_split % group if several else group % per_split):
        raise ValueError(f"{config.inputs_per_chunk} inputs a program and groups of {group}: one must divide the other")
    several = several and group < n_in
    if several and group % 32:
        raise ValueError(f"a program cannot take several groups of {group} inputs: that is no multiple of 32")
    part_0, part_1, part_2 = (*parts, 0, 0)[:3]
    blocks = _blocks(parts, config)
    finishers = _finishers(table, parts, config, rows, x.dtype) if alone else 1
    if epilogue == "residual" and (squares is None or squares.shape != (rows, blocks * finishers)):
        raise ValueError(f"a residual product needs squares of shape {(rows, blocks * finishers)}")
    splits = -(-n_in // config.inputs_per_chunk)
    stretch = power_of_two(config.inputs_per_chunk)
    listed = not config.dense
    if listed and config.inputs_per_chunk > MAX_LISTED:
        raise ValueError(f"a program lists at most {MAX_LISTED} inputs, not {config.inputs_per_chunk}")
    if min(per_split, n_in) * weights.stride(0) > _MOST_ELEMENTS:
        raise ValueError(f"a program reads at most {_MOST_ELEMENTS} elements of a table, not so many of {n_in} rows")
    if splits * rows * blocks * config.block_out > _MOST_ELEMENTS:
        raise ValueError(f"{splits} times {rows} rows of {sum(parts)} partial sums are more than {_MOST_ELEMENTS}")
    block_in, unroll = _tile(config, rows, bits)
    list_bytes = _list_bytes(config, rows, bits, x.itemsize)
    lanes = _lanes(stretch, config)
    piece = min(stretch, group) if several else stretch
    # A power of two, so that steps of so many lines end where a full stretch does.
    most = _MOST_TAKEN
    if partials is not None:
        most = min(most, _MOST_TAKEN_OF_HEADS // power_of_two(min(FIRST_LINES, partials.splits)))
    taken = max(1, min(piece // lanes, most // power_of_two(rows)))
    # Inputs of a batch that is read whole are normalised as matrix units take tiles of them, and need no list.
    norm_of_tiles = norm is not None and partials is None and not listed and not by_elements(rows, bits)
    norm_first = norm is not None and not norm_of_tiles
    in_memory = list_bytes == 0 and (listed or norm_first or partials is not None)
    word = {2: torch.int32, 4: torch.int64}[x.itemsize]  # an index beside the value
    batch = power_of_two(rows)
    threads, columns = 32 * config.warps, batch * config.block_out // finishers
    gathered = _GATHERED_REGISTERS // (2 if epilogue == "gated" else 1)
    even = all(part % config.block_out == 0 for part in parts)
    alike = 1 if partials is None else _alike(partials.head_size, group if several else per_split, lanes, taken)
    launch(
        gemv_kernel,
        (blocks, splits),
        x,
        x if norm is None else norm.weight,
        thresholds if norm is None else norm.squares,
        thresholds if partials is None else partials.sums,
        thresholds if partials is None else partials.logs,
        thresholds if partials is None else partials.positions,
        weights,
        table.scales if isinstance(table, Packed) else x,
        x if not isinstance(table, Packed) or table.zeros is None else table.zeros,
        thresholds,
        x if bias is None else bias,
        y,
        thresholds if squares is None else squares,
        scratch.tensor("partial", splits * rows * blocks * config.block_out, torch.int32, EMPTY),
        scratch.tensor(f"inputs {word}", blocks * splits * stretch * rows if in_memory else 1, word),
        scratch.tensor("counts", 3, torch.int64, 0) if counts is None else counts,
        n_in,
        weights.stride(0),
        part_0,
        part_1,
        part_2,
        config.inputs_per_chunk,
        splits,
        group,
        1 if norm is None else norm.squares.shape[1],
        0.0 if norm is None else norm.eps,
        0 if partials is None else partials.window,
        BITS=bits,
        ZEROS=isinstance(table, Packed) and table.zeros is not None,
        SEVERAL_GROUPS=several,
        ROWS=rows,
        BATCH=batch,
        LISTED=listed,
        NORM=norm_first,
        NORM_OF_TILES=norm_of_tiles,
        HEAD_SIZE=0 if partials is None else partials.head_size,
        HEAD_SPLITS=0 if partials is None else partials.splits,
        HEAD_SHORTEST=0 if partials is None else partials.shortest,
        ALIKE=alike,
        EPILOGUE=_EPILOGUES[epilogue],
        HAS_BIAS=bias is not None,
        EVEN=even,
        FULL=stretch % lanes == 0 and n_in % stretch == 0 and stretch == per_split and not several,
        SQUARES=1 if norm is None else power_of_two(norm.squares.shape[1]),
        SPLIT=splits > 1,
        LINES=max(1, threads // columns, min(power_of_two(splits), gathered * threads // columns)),
        FINISHERS=finishers,
        STRETCH=stretch,
        SLOTS=_slots(config, rows, bits) if list_bytes else stretch,
        SHARED=list_bytes,
        LANES=lanes,
        INPUT_LINES=taken,
        AT_ONCE=stretch <= lanes * taken and not several,
        BLOCK_OUT=config.block_out,
        BLOCK_IN=block_in,
        UNROLL=unroll,
        WARPS=config.warps,
        EVICT="evict_first" if config.evict_first else "",
        warps=config.warps,
        pdl=pdl,
        compile_only=compile_only,
    )
