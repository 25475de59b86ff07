"""Which tile config a product gets: the nearest measured one, sparse only where that was faster."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from teal_kernels import tuning_files
from teal_kernels.triton_gemv import MAX_ROWS, TileConfig
from teal_kernels.tuning import UNTUNED, choose_config
from teal_kernels.tuning_entries import Entry, Provenance
from teal_kernels.tuning_files import (
    PACKAGED,
    TABLE_VERSION,
    TuningTableError,
    as_text,
    keep_entries,
    read_table,
    table_of,
    user_table,
)

pytestmark = pytest.mark.usefixtures("own_tables")
CPU = torch.device("cpu")
GPU = torch.device("cuda")
TABLES = sorted(PACKAGED.glob("*.json"))
H100 = "NVIDIA H100 80GB HBM3"
LLAMA_3_8B = [
    (4096, (4096, 1024, 1024), "plain"),
    (4096, (4096,), "residual"),
    (4096, (14336, 14336), "gated"),
    (14336, (4096,), "residual"),
]
DENSE = TileConfig(block_out=64, block_in=4, unroll=2, inputs_per_chunk=256, warps=1, dense=True)
SPARSE = replace(DENSE, dense=False)

Write = Callable[..., None]


def _entry(sparsity: float, microseconds: float, config: TileConfig | None = None, **product: Any) -> Entry:
    """One of a 1024 x 1024 product in bfloat16, unless said otherwise."""
    product = {"inputs": 1024, "outputs": (1024,), "dtype": "bfloat16", "rows": 1, "epilogue": "plain"} | product
    config = config or (DENSE if sparsity == 0.0 else SPARSE)
    return Entry(**product, sparsity=sparsity, microseconds=microseconds, config=config)


@pytest.fixture
def write() -> Write:
    """Write a user's table; the CPU has one too, so that no GPU is needed to read it."""

    def _write(*entries: Entry, device: str = "cpu", version: int = TABLE_VERSION) -> None:
        path = user_table(device)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"version": version, "entries": [entry.to_dict() for entry in entries]}
        path.write_text(json.dumps(content))
        table_of.cache_clear()

    return _write


def _choose(sparsity: float, *, device: torch.device = CPU, **product: Any) -> TileConfig:
    product = {"inputs": 1024, "parts": (1024,), "dtype": torch.bfloat16, "rows": 1, "epilogue": "plain"} | product
    return choose_config(device, sparsity=sparsity, **product)


def test_a_table_is_searched_once_for_a_product(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session asks for each product of each block; a table that is written meanwhile is searched anew."""
    asked: list[int] = []
    found = Entry.distance
    monkeypatch.setattr(Entry, "distance", lambda entry, *product: asked.append(1) or found(entry, *product))
    write(_entry(0.0, 10.0), _entry(0.5, 6.0))
    assert _choose(0.5) == SPARSE
    assert len(asked) > 0
    asked.clear()
    assert (_choose(0.5), _choose(0.0)) == (SPARSE, DENSE)
    assert not asked
    write(_entry(0.0, 10.0), _entry(0.5, 12.0))
    assert _choose(0.5) == DENSE


@pytest.fixture
def on_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: H100)


@pytest.mark.parametrize(("inputs", "parts", "epilogue"), LLAMA_3_8B, ids=str)
@pytest.mark.usefixtures("on_h100")
def test_packaged_h100_table(inputs: int, parts: tuple[int, ...], epilogue: str) -> None:
    product = {"inputs": inputs, "parts": parts, "epilogue": epilogue, "device": GPU}
    entries = [e for e in table_of(H100) if (e.inputs, e.outputs, e.epilogue, e.rows) == (inputs, parts, epilogue, 1)]
    measured = {entry.sparsity: entry.config for entry in entries if entry.dtype == "bfloat16"}
    assert _choose(0.0, **product) == measured[0.0]
    assert _choose(0.0, **product).dense
    assert _choose(0.5, **product) == measured[0.5]
    assert not _choose(0.5, **product).dense
    assert _choose(0.52, **product) == measured[0.5]
    assert not _choose(0.95, **product).dense


@pytest.mark.parametrize(("inputs", "parts", "epilogue"), LLAMA_3_8B, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, MAX_ROWS])
@pytest.mark.usefixtures("on_h100")
def test_every_product_gets_a_tile_config(inputs: int, parts: tuple[int, ...], epilogue: str, rows: int) -> None:
    """Whatever the shape, the dtype, the batch and the sparsity; at sparsity zero a dense read."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for factor in (1, 3, 64):
            shape = {"inputs": inputs // factor, "parts": tuple(part // factor for part in parts)}
            for sparsity in (0.0, 0.01, 0.3, 0.6, 0.99):
                config = _choose(sparsity, **shape, dtype=dtype, rows=rows, epilogue=epilogue, device=GPU)
                assert config.dense or sparsity > 0.0


@pytest.mark.parametrize(
    ("inputs", "parts", "epilogue", "dtype", "rows", "sparsity", "chosen"),
    [
        (4096, (4096, 1024, 1024), "plain", "bfloat16", 1, 0.5, (128, 4, 4, 128, 1, False, True)),
        (4096, (14336, 14336), "gated", "bfloat16", 4, 0.5, (128, 16, 2, 2048, 2, True, False)),
        (4096, (14336, 14336), "gated", "bfloat16", 4, 0.85, (256, 16, 1, 512, 2, False, True)),
        (14336, (4096,), "residual", "int8", 2, 0.7, (128, 4, 4, 224, 1, False, True)),
        (4096, (4096,), "residual", "int4", 1, 0.4, (64, 8, 4, 128, 1, False, True)),
        (4096, (4096,), "residual", "int8", 1, 0.25, (128, 8, 4, 128, 1, True, True)),
        (5120, (27648, 27648), "gated", "float16", 3, 0.9, (256, 16, 1, 512, 2, False, True)),
        (4096, (128256,), "plain", "bfloat16", 1, 0.4, (512, 1, 8, 512, 2, False, True)),
    ],
)
@pytest.mark.usefixtures("on_h100")
def test_some_choices_of_the_packaged_table(
    inputs: int, parts: tuple[int, ...], epilogue: str, dtype: str, rows: int, sparsity: float, chosen: tuple[int, ...]
) -> None:
    """As they were before the table kept what was measured apart from what decides."""
    product = {"inputs": inputs, "parts": parts, "epilogue": epilogue, "dtype": dtype, "rows": rows, "device": GPU}
    assert _choose(sparsity, **product) == TileConfig(*chosen)


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_packaged_tables_load(path: Path) -> None:
    entries = read_table(path)
    assert as_text(entries) == path.read_text()  # nothing is lost, and every entry has a line of its own
    assert {user_table(str(entry.measured.device)).name for entry in entries} == {path.name}  # or its GPU finds none
    assert all(entry.measured.torch and entry.measured.triton for entry in entries)
    assert all(entry.measured.commit or entry.measured.recorded_in for entry in entries)
    assert len({(entry.product, entry.sparsity, entry.config.dense) for entry in entries}) == len(entries)
    for entry in entries:
        config = entry.config
        assert entry.cost > 0.0
        assert entry.microseconds is None or 0.0 < entry.microseconds <= entry.cost
        assert (entry.deciding_microseconds is None) == (entry.deciding_because is None)
        assert 1 <= entry.rows <= MAX_ROWS
        assert 1 <= len(entry.outputs) <= 3
        assert entry.dtype in ("float32", "float16", "bfloat16", "int8", "int4")
        assert entry.epilogue in ("plain", "residual", "gated")
        assert config.dense == (entry.sparsity == 0.0)
        assert config.unroll > 0
        assert config.inputs_per_chunk > 0
        sizes = [config.block_out, config.block_in, config.warps]
        assert all(size > 0 and size & (size - 1) == 0 for size in sizes)
    dense = {entry.product for entry in entries if entry.config.dense}
    assert dense == {entry.product for entry in entries}  # what sparse is compared with


def test_never_sparse_where_that_was_not_faster(write: Write) -> None:
    """Between 0.5 (12 microseconds) and 0.8 (6) the line meets the dense read (10) at 0.6."""
    write(_entry(0.0, 10.0), _entry(0.5, 12.0), _entry(0.8, 6.0))
    assert [_choose(sparsity).dense for sparsity in (0.0, 0.3, 0.5, 0.59)] == [True] * 4
    assert [_choose(sparsity).dense for sparsity in (0.61, 0.7, 0.8, 0.95)] == [False] * 4


def test_beyond_what_was_measured_the_line_goes_on(write: Write) -> None:
    """From 0.4 (8) and 0.6 (6) down: 10, as the dense read takes, at 0.2."""
    write(_entry(0.0, 10.0), _entry(0.4, 8.0), _entry(0.6, 6.0))
    assert [_choose(sparsity).dense for sparsity in (0.1, 0.19, 0.21, 0.3, 0.9)] == [True, True, False, False, False]
    write(_entry(0.0, 10.0), _entry(0.4, 8.0), _entry(0.6, 9.5))  # upwards: 10.25 at 0.7
    assert [_choose(sparsity).dense for sparsity in (0.62, 0.7)] == [False, True]


def test_of_one_measured_sparsity_the_line_begins_at_the_dense_read(write: Write) -> None:
    """From 10.4 (all inputs listed) to 5 microseconds at 0.5: 10, as the dense read takes, at 0.037."""
    write(_entry(0.0, 10.0), _entry(0.5, 5.0))
    assert [_choose(sparsity).dense for sparsity in (0.01, 0.03, 0.05, 0.5)] == [True, True, False, False]
    write(_entry(0.0, 10.0), _entry(0.5, 9.9))  # the line meets 10 at 0.4
    assert [_choose(sparsity).dense for sparsity in (0.3, 0.39, 0.41)] == [True, True, False]


def test_every_further_row_must_gain_more(write: Write) -> None:
    """Two rows at the root of a half leave a half unread, as one row does: 9.4 microseconds and 8 % more."""
    write(_entry(0.0, 10.0), _entry(0.5, 9.4))
    assert not _choose(0.5).dense
    assert _choose(0.5**0.5, rows=2).dense
    write(_entry(0.0, 10.0), _entry(0.5, 9.2))
    assert not _choose(0.5**0.5, rows=2).dense
    assert _choose(0.5**0.25, rows=4).dense


def test_no_gain_is_dense(write: Write) -> None:
    write(_entry(0.0, 10.0), _entry(0.5, 10.0))
    assert _choose(0.5).dense
    write(_entry(0.0, 10.0))
    assert _choose(0.9).dense


def test_nearest_sparsity(write: Write) -> None:
    configs = {sparsity: replace(SPARSE, unroll=unroll) for sparsity, unroll in ((0.3, 2), (0.5, 4), (0.8, 8))}
    write(_entry(0.0, 10.0), *(_entry(sparsity, 9.0 - 5 * sparsity, config) for sparsity, config in configs.items()))
    for asked, nearest in ((0.1, 0.3), (0.39, 0.3), (0.41, 0.5), (0.64, 0.5), (0.66, 0.8), (0.99, 0.8)):
        assert _choose(asked) == configs[nearest]


def test_a_batch_reads_what_any_row_needs(write: Write) -> None:
    """The line of one row, 12 - 10 s, is taken at what all rows leave unread, and lengthened for further rows.

    It meets the dense read (10) at 0.2; for two rows (8 % more) at 0.274, the square of 0.524; for eight
    (56 %) at 0.559, the eighth power of 0.930.
    """
    write(_entry(0.0, 10.0), _entry(0.4, 8.0), _entry(0.6, 6.0))
    for rows, low, high in ((1, 0.19, 0.21), (2, 0.51, 0.53), (8, 0.92, 0.94)):
        assert [_choose(sparsity, rows=rows).dense for sparsity in (low, high)] == [True, False]
    write(_entry(0.0, 10.0, rows=4), _entry(0.4, 8.0, rows=4), _entry(0.6, 6.0, rows=4))
    assert not _choose(0.21, rows=4).dense
    # Four rows further: 32 %, at 0.442, the square of 0.665.
    assert [_choose(sparsity, rows=8).dense for sparsity in (0.65, 0.68)] == [True, False]


def _marked(number: int) -> TileConfig:
    """A dense tile config that can be told from others."""
    return replace(DENSE, inputs_per_chunk=1000 + number)


def test_nearest_shape(write: Write) -> None:
    write(
        _entry(0.0, 10.0, _marked(0)),
        _entry(0.0, 1.0, _marked(1), inputs=4096),
        _entry(0.0, 1.0, _marked(2), outputs=(4096, 1024, 1024)),
        _entry(0.0, 1.0, _marked(3), inputs=4096, outputs=(4096, 1024, 1024)),
    )
    assert _choose(0.0) == _marked(0)
    assert _choose(0.0, inputs=1100, parts=(700, 200)) == _marked(0)
    assert _choose(0.0, inputs=14336) == _marked(1)
    assert _choose(0.0, inputs=576, parts=(8192,)) == _marked(2)
    assert _choose(0.0, inputs=8192, parts=(8192, 1024, 1024)) == _marked(3)


def test_nearest_rows_epilogue_and_size_of_dtype(write: Write) -> None:
    write(
        _entry(0.0, 10.0, _marked(1)),
        _entry(0.0, 10.0, _marked(8), rows=8),
        _entry(0.0, 10.0, _marked(2), epilogue="gated"),
        _entry(0.0, 10.0, _marked(4), dtype="float32"),
    )
    assert _choose(0.0, rows=2) == _marked(1)
    assert _choose(0.0, rows=3) == _marked(8)
    assert _choose(0.0, rows=6) == _marked(8)
    assert _choose(0.0, rows=8, inputs=4096) == _marked(8)  # rows matter more than the shape
    assert _choose(0.0, epilogue="gated") == _marked(2)
    assert _choose(0.0, epilogue="residual") == _marked(1)
    assert _choose(0.0, dtype=torch.float32) == _marked(4)
    assert _choose(0.0, dtype=torch.float16) == _marked(1)


def test_other_bits_are_further_than_twice_the_rows(write: Write) -> None:
    write(
        _entry(0.0, 10.0, _marked(1)),
        _entry(0.0, 10.0, _marked(4), rows=4, dtype="int8"),
        _entry(0.0, 10.0, _marked(8), rows=8, dtype="int4"),
    )
    assert _choose(0.0, rows=8, dtype="int8") == _marked(4)
    assert _choose(0.0, rows=4, dtype="int4") == _marked(8)
    assert _choose(0.0, rows=4) == _marked(1)


@pytest.mark.usefixtures("on_h100")
def test_a_users_table_goes_before_the_packaged_one(write: Write) -> None:
    inputs, parts, epilogue = LLAMA_3_8B[0]
    product = {"inputs": inputs, "parts": parts, "epilogue": epilogue, "device": GPU}
    other = {"inputs": 14336, "parts": (4096,), "epilogue": "residual", "device": GPU}
    packaged, packaged_other = _choose(0.5, **product), _choose(0.5, **other)
    own = replace(SPARSE, inputs_per_chunk=1024)
    measured = {"inputs": inputs, "outputs": parts, "epilogue": epilogue}
    write(_entry(0.0, 10.0, **measured), _entry(0.5, 5.0, own, **measured), device=H100)
    assert packaged != own
    assert _choose(0.5, **product) == own
    assert _choose(0.0, **product) == DENSE
    assert _choose(0.5, **other) == packaged_other  # which the user has not measured


def test_a_table_of_another_version_is_ignored(write: Write) -> None:
    packaged = _choose(0.0)
    write(_entry(0.0, 10.0, _marked(0)))
    assert _choose(0.0) == _marked(0)
    write(_entry(0.0, 10.0, _marked(0)), version=TABLE_VERSION + 1)
    assert not tuning_files.has_table("cpu")  # nor does `teal info` call the GPU tuned
    assert _choose(0.0) == packaged


def test_without_any_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning_files, "PACKAGED", tmp_path)
    assert _choose(0.0) == replace(UNTUNED, dense=True)
    assert _choose(0.1).dense
    assert _choose(0.5) == UNTUNED


HERE = Provenance(device="cpu", torch="1", triton="2", commit="abc")


def test_kept_entries_are_chosen_at_once() -> None:
    keep_entries([_entry(0.0, 10.0, _marked(0)), _entry(0.0, 10.0, _marked(1), rows=4)], "cpu", HERE)
    assert _choose(0.0) == _marked(0)
    newer = replace(HERE, commit="def")
    path = keep_entries([_entry(0.0, 12.0, _marked(2))], "cpu", newer)  # slower, but newer
    assert _choose(0.0) == _marked(2)
    assert _choose(0.0, rows=4) == _marked(1)
    assert path == user_table("cpu")
    assert [(entry.rows, entry.measured) for entry in read_table(path)] == [(4, HERE), (1, newer)]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_table_appears_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    path = keep_entries([_entry(0.0, 10.0)], "cpu", HERE)
    before = path.read_text()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tuning_files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        keep_entries([_entry(0.0, 12.0)], "cpu", HERE)
    assert path.read_text() == before
    assert list(path.parent.iterdir()) == [path]


def test_what_decides_is_kept_beside_what_was_measured(write: Write) -> None:
    raised = replace(_entry(0.5, 8.0), deciding_microseconds=11.0, deciding_because="a token took longer")
    write(_entry(0.0, 10.0), raised)
    assert _choose(0.5).dense
    assert read_table(user_table("cpu"))[1] == raised
    write(_entry(0.0, 10.0), replace(raised, microseconds=None))
    assert _choose(0.5).dense
    with pytest.raises(ValueError, match="neither"):
        replace(_entry(0.5, 8.0), microseconds=None)


def _both(sparsities: tuple[float, ...] = (0.25, 0.8), **product: Any) -> list[Entry]:
    return [
        _entry(0.0, 10.0, **product),
        *(_entry(sparsity, 10.0 - 9.0 * sparsity, **product) for sparsity in sparsities),
    ]


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9])
def test_as_near_in_rows(write: Write, sparsity: float) -> None:
    """Two rows lie between one and four, and both were measured at the same sparsities."""
    write(*_both(rows=1), *_both(rows=4))
    assert not _choose(sparsity, rows=2).dense


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_both_16_bit_dtypes_measured(write: Write, sparsity: float) -> None:
    """As when a user tunes float16 beside the packaged bfloat16: each has its own."""
    halves = [replace(entry, config=replace(entry.config, unroll=8)) for entry in _both(dtype="float16")]
    write(*_both(dtype="bfloat16"), *halves)
    assert _choose(sparsity, dtype=torch.float16) == replace(SPARSE, unroll=8)
    assert _choose(sparsity, dtype=torch.bfloat16) == SPARSE


def test_a_product_without_a_dense_measurement_is_passed_over(write: Write) -> None:
    write(_entry(0.5, 1.0), _entry(0.0, 10.0, _marked(1), rows=8))
    assert _choose(0.5) == _marked(1)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"version": 3}', '{"version": 3, "entries": [{}]}', '{"version": 3, "entries": 3}'],
)
def test_a_damaged_table_is_named(content: str) -> None:
    path = user_table("cpu")
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(TuningTableError, match=r"cpu\.json cannot be read"):
        _choose(0.5)
    keep_entries([_entry(0.0, 10.0, _marked(1))], "cpu", HERE)  # to tune again mends it
    assert _choose(0.5) == _marked(1)


def test_quantised_products_have_entries_of_their_own(own_tables: None) -> None:
    write = [_entry(0.0, 10.0, _marked(1), dtype="bfloat16"), _entry(0.0, 10.0, _marked(2), dtype="int8")]
    keep_entries(write, "cpu", HERE)
    assert _choose(0.0, dtype=torch.bfloat16) == _marked(1)
    assert _choose(0.0, dtype="int8") == _marked(2)
    # Where none was measured, the nearest: with as many bytes in a tile.
    chosen = _choose(0.0, dtype="int4")
    assert chosen == replace(_marked(2), block_in=2 * _marked(2).block_in)
