"""Launch plans, without a GPU: what they say of an H100 and of a small one."""

from dataclasses import replace

import pytest

from teal_kernels import plan_gemv
from teal_kernels.launching import DeviceFacts
from teal_kernels.plan_gemv import MAX_LISTED, MAX_ROWS, ProductShape, TileConfig, plan_product, squares_of

H100 = DeviceFacts(multiprocessors=132, shared_memory=228 << 10)
A6000 = DeviceFacts(multiprocessors=84, shared_memory=100 << 10)
SMALL = DeviceFacts(multiprocessors=20, shared_memory=64 << 10)
NO_GPU = DeviceFacts(multiprocessors=0, shared_memory=0, interpreter=True)
DEVICES = pytest.mark.parametrize("device", [H100, A6000, SMALL], ids=["H100", "A6000", "small"])

CONFIG = TileConfig(block_out=128, block_in=8, unroll=4, inputs_per_chunk=512, warps=2)


def _shape(
    rows: int = 1,
    inputs: int = 4096,
    parts: tuple[int, ...] = (4096,),
    *,
    bits: int = 16,
    itemsize: int = 2,
    group: int = 0,
    epilogue: str = "plain",
    norm_squares: int = 0,
) -> ProductShape:
    stride = sum(parts) * bits // 32 if bits < 16 else sum(parts)
    return ProductShape(
        rows, inputs, parts, itemsize, bits, group or inputs, stride, epilogue=epilogue, norm_squares=norm_squares
    )


@DEVICES
def test_a_program_for_each_block_and_chunk(device: DeviceFacts) -> None:
    plan = plan_product(_shape(parts=(4096, 1000, 24), inputs=4000), CONFIG, device)
    assert plan.grid == (32 + 8 + 1, 8)
    assert plan.partial_sums == 8 * 41 * 128
    assert plan.epilogue.split
    assert not plan.epilogue.even
    assert plan_product(_shape(parts=(4096, 1024)), CONFIG, device).epilogue.even
    assert not plan_product(_shape(inputs=512), CONFIG, device).epilogue.split


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("bits", [4, 8, 16])
@DEVICES
def test_reducers_run_at_one_time(device: DeviceFacts, rows: int, bits: int) -> None:
    """All reducers of a grid are resident together, or each block has one, which waits for no other."""
    for block_out in (32, 64, 256):
        for warps in (1, 4, 8):
            for dense in (False, True):
                config = replace(CONFIG, block_out=block_out, warps=warps, dense=dense)
                for parts in ((64,), (4096,), (14336, 14336)):
                    plan = plan_product(_shape(rows, parts=parts, bits=bits, group=128), config, device)
                    reducers, blocks = plan.epilogue.reducers, plan.grid[0]
                    assert reducers in (1, 2, 4)
                    resident = device.multiprocessors * max(1, 8 // warps)
                    assert reducers == 1 or blocks * reducers <= resident
                    assert reducers <= plan.grid[1]
                    assert block_out % reducers == 0


def test_more_reducers_where_there_is_room() -> None:
    found = [
        [plan_product(_shape(parts=(parts,)), CONFIG, device).epilogue.reducers for parts in (4096, 14336, 32768)]
        for device in (H100, A6000, SMALL)
    ]
    assert found == [[4, 4, 2], [4, 2, 1], [2, 1, 1]]


def test_reducers_of_a_batch_have_room() -> None:
    """Of 112 blocks of two tiles each in float32, two programs fit a multiprocessor of 100 KiB."""
    config = TileConfig(block_out=256, block_in=1, unroll=16, inputs_per_chunk=256, warps=1, dense=True)
    shape = _shape(1, parts=(14336, 14336), itemsize=4, bits=32)
    single, batch = (squares_of(replace(shape, rows=rows), config, A6000) // 112 for rows in (1, 2))
    assert (single, batch) == (4, 1)


def test_one_reducer_without_the_device_for_itself() -> None:
    shape = _shape(epilogue="residual")
    assert plan_product(shape, CONFIG, H100).squares == squares_of(shape, CONFIG, H100) == 32 * 4
    beside = plan_product(shape, CONFIG, H100, exclusive_device=False)
    assert (beside.squares, beside.epilogue.reducers) == (32, 1)
    assert plan_product(shape, CONFIG, NO_GPU).epilogue.reducers == 1


def test_squares_count_blocks_of_each_part() -> None:
    for parts, blocks in (((64,), 2), ((65, 1), 4), ((32, 32, 31), 3)):
        assert squares_of(_shape(parts=parts), replace(CONFIG, block_out=32), NO_GPU) == blocks


def test_lists_take_room_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 100 KiB: tiles take 29 KiB a program, the list of two rows 8.5 more."""
    config = TileConfig(block_out=128, block_in=16, unroll=1, inputs_per_chunk=512, warps=2)
    shape = _shape(2, itemsize=4, bits=16)
    assert plan_gemv._resident(shape, config, A6000) == 2
    monkeypatch.setattr(plan_gemv, "_MAX_LIST_BYTES", 0)
    assert plan_gemv._resident(shape, config, A6000) == 3


def test_tiles_are_as_what_takes_them_needs() -> None:
    """Tensor cores 16 rows at least. On the FMA path, of two rows, no more than registers hold sums for."""
    config = TileConfig(block_out=128, block_in=4, unroll=4, inputs_per_chunk=512, warps=1)

    def tile(config: TileConfig, rows: int, bits: int) -> tuple[int, int]:
        found = plan_product(_shape(rows, bits=bits, group=512), config, H100).tile
        return found.block_in, found.unroll

    for rows, bits in ((1, 16), (1, 4), (2, 8), (2, 4)):
        assert tile(config, rows, bits) == (4, 4)
        assert plan_gemv._tiles_bytes(_shape(rows, bits=bits), config, sets=3) == 0
    for rows, bits in ((2, 16), (3, 8), (3, 4)):
        assert tile(config, rows, bits) == (16, 1)
        assert plan_gemv._tiles_bytes(_shape(rows, bits=bits), config, sets=3) > 0
    of_batches = replace(config, block_in=64, unroll=2)
    assert tile(of_batches, 2, 4) == (8, 2)
    assert tile(replace(of_batches, block_out=2048), 2, 4) == (1, 2)
    assert tile(of_batches, 1, 4) == tile(of_batches, 2, 16) == (64, 2)


def test_a_list_leaves_room_for_tiles() -> None:
    """Triton asks for more than 48 KiB of a program's shared memory only where its own tiles are more than that."""
    config = TileConfig(block_out=64, block_in=64, unroll=2, inputs_per_chunk=1024, warps=4)
    in_memory = plan_product(_shape(3), config, H100)
    assert in_memory.inputs.shared_bytes == 0
    assert in_memory.list_entries == 64 * 4 * 1024 * 3
    shared = plan_product(_shape(3), replace(config, block_in=32), H100)
    assert shared.inputs.shared_bytes == 3 * (1024 + 128) * 4
    assert shared.list_entries == 0


@DEVICES
def test_nothing_is_listed_where_all_is_read(device: DeviceFacts) -> None:
    dense = replace(CONFIG, dense=True)
    plan = plan_product(_shape(), dense, device)
    assert not plan.inputs.taken
    assert plan.list_entries == 0
    single = plan_product(_shape(norm_squares=8), dense, device).inputs  # what is normalised is written to the list
    assert (single.norm, single.norm_in_tiles, single.taken) == (True, False, True)
    batch = plan_product(_shape(3, norm_squares=8), dense, device).inputs  # tensor cores normalise their tiles
    assert (batch.norm, batch.norm_in_tiles, batch.taken) == (False, True, False)


def test_vectors_are_as_wide_as_what_takes_them() -> None:
    """One warp where it counts; otherwise the program, if the chunk is that long. The interpreter takes all at once."""
    config = TileConfig(block_out=64, block_in=16, unroll=2, inputs_per_chunk=1024, warps=4)
    assert plan_product(_shape(), config, H100).inputs.lanes == 32
    assert plan_product(_shape(), replace(config, dense=True), H100).inputs.lanes == 128
    short = replace(config, dense=True, inputs_per_chunk=64)
    assert plan_product(_shape(), short, H100).inputs.lanes == 32
    interpreted = plan_product(_shape(), config, NO_GPU).inputs
    assert (interpreted.lanes, interpreted.vectors, interpreted.at_once) == (1024, 1, True)


def test_vectors_that_lie_in_one_head() -> None:
    shape = replace(_shape(), head_size=128, splits=16, split_multiple=64)
    assert plan_product(shape, CONFIG, H100).inputs.vectors_per_head == 4
    assert plan_product(replace(shape, head_size=80), CONFIG, H100).inputs.vectors_per_head == 1
    assert plan_product(replace(shape, rows=8), CONFIG, H100).inputs.vectors == 1


@pytest.mark.parametrize("epilogue", ["plain", "gated"])
@pytest.mark.parametrize("rows", [1, 8])
def test_partial_sums_fit_the_registers_that_gather_them(rows: int, epilogue: str) -> None:
    for block_out in (32, 256, 2048):
        config = replace(CONFIG, block_out=block_out, inputs_per_chunk=64)
        plan = plan_product(_shape(rows, parts=(4096, 4096), epilogue=epilogue), config, H100)
        columns = plan.epilogue.batch * block_out // plan.epilogue.reducers
        sets, threads = 2 if epilogue == "gated" else 1, 32 * config.warps
        at_least = max(1, threads // columns)  # no fewer words than threads: several would hold one
        assert plan.epilogue.gathered >= at_least
        assert plan.epilogue.gathered == at_least or plan.epilogue.gathered * columns * sets <= 32 * threads


CANNOT = {
    "9 rows": (_shape(MAX_ROWS + 1), CONFIG),
    "parts": (_shape(parts=(8, 8, 8, 8)), CONFIG),
    "gated": (_shape(parts=(16, 24), epilogue="gated"), CONFIG),
    "gated product": (_shape(parts=(40,), epilogue="gated"), CONFIG),
    "words of 4 bits": (_shape(bits=4, group=128), replace(CONFIG, block_out=4)),
    "one must divide the other": (_shape(bits=4, group=96), CONFIG),
    "no multiple of 32": (_shape(bits=4, group=16), CONFIG),
    "at most 32768 inputs": (_shape(), replace(CONFIG, inputs_per_chunk=2 * MAX_LISTED)),
    "2147483647 elements of a table": (replace(_shape(), row_stride=1 << 29), CONFIG),
    "partial sums are more": (_shape(8, parts=(1 << 27,)), replace(CONFIG, inputs_per_chunk=2)),
}


@pytest.mark.parametrize("match", CANNOT)
def test_what_cannot_be_launched(match: str) -> None:
    shape, config = CANNOT[match]
    with pytest.raises(ValueError, match=match):
        plan_product(shape, config, H100)
