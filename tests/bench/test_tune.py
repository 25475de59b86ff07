"""Choosing tile configs by the time of a token, whatever they are worth by themselves."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from teal_cli.bench import tune
from teal_cli.bench.products import TimedProduct
from teal_cli.bench.tune import candidates, settle
from teal_cli.errors import MachineError
from teal_kernels.launching import uses_fma
from teal_kernels.packing import Packed
from teal_kernels.triton_gemv import TileConfig
from teal_kernels.tuning import choose_config, trying
from teal_kernels.tuning_entries import Entry, Provenance
from teal_kernels.tuning_files import keep_entries, table_of

pytestmark = pytest.mark.usefixtures("own_tables")
CPU = torch.device("cpu")
TABLE = torch.empty(0, dtype=torch.bfloat16)
TILE = TileConfig(block_out=64, block_in=4, unroll=2, inputs_per_chunk=128, warps=1)
FIRST, SECOND = (256, (512,), "residual"), (512, (256, 256), "gated")


def _entry(product: tuple[int, tuple[int, ...], str], sparsity: float, warps: int) -> Entry:
    inputs, outputs, epilogue = product
    config = replace(TILE, warps=warps, dense=sparsity == 0.0)
    return Entry(inputs, outputs, "float32", 1, epilogue, sparsity, 10.0 - 5.0 * sparsity, config)


def _chosen(product: tuple[int, tuple[int, ...], str], sparsity: float) -> TileConfig:
    inputs, parts, epilogue = product
    return choose_config(
        CPU, inputs=inputs, parts=parts, dtype=torch.float32, rows=1, epilogue=epilogue, sparsity=sparsity
    )


def _product(inputs: int, parts: tuple[int, ...], rows: int, table: Tensor | Packed = TABLE) -> Any:
    """As much of a product as its tile configs depend on."""
    return SimpleNamespace(inputs=inputs, parts=parts, rows=rows, device=CPU, tables=[table])


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize(
    ("inputs", "parts"),
    [(4096, (4096, 1024, 1024)), (14336, (4096,)), (2048, (2048,)), (576, (576, 192, 192)), (64, (64,))],
    ids=str,
)
def test_there_is_something_to_time_for_every_shape(
    inputs: int, parts: tuple[int, ...], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "multiprocessors", lambda device: 132)
    product = _product(inputs, parts, rows)
    for dense in (True, False):
        found = list(candidates(product, dense=dense))
        assert 3 <= len(found) == len(set(found))
        assert all(config.dense == dense for config in found)
        for config in found:
            loaded = config.block_in * config.block_out * torch.bfloat16.itemsize
            assert loaded % (16 * 32 * config.warps) == 0  # whole loads of 16 bytes a thread


def test_a_search_would_find_what_is_packaged_for_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "multiprocessors", lambda device: 132)
    packaged = table_of("NVIDIA H100 80GB HBM3")
    batches = [entry for entry in packaged if entry.rows > 1 and entry.dtype == "bfloat16"]
    assert {entry.rows for entry in batches} == {2, 4, 8}
    for entry in batches:
        config = replace(entry.config, evict_first=True)
        if config.inputs_per_chunk == 1792:  # an eighth of 14,336: a search takes powers of two
            continue
        assert config in candidates(_product(entry.inputs, entry.outputs, entry.rows), dense=config.dense), entry


def test_a_search_would_find_what_is_packaged_for_half_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "multiprocessors", lambda device: 132)
    packaged = table_of("NVIDIA H100 80GB HBM3")
    elementwise = [entry for entry in packaged if entry.dtype == "int4" and uses_fma(entry.rows, bits=4)]
    assert {entry.rows for entry in elementwise} == {1, 2}
    for entry in elementwise:
        words = torch.empty(entry.inputs, sum(entry.outputs) // 8, dtype=torch.int32, device="meta")
        scales = torch.empty(entry.inputs // 128, sum(entry.outputs), device="meta")
        packed = Packed(words, scales, None, bits=4, group=128, parts=entry.outputs)
        product = _product(entry.inputs, entry.outputs, entry.rows, packed)
        assert replace(entry.config, evict_first=True) in candidates(product, dense=entry.config.dense), entry


@pytest.mark.parametrize("processors", [1, 16, 48])
def test_a_product_too_large_for_a_gpu_is_timed_all_the_same(processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "multiprocessors", lambda device: processors)
    product = _product(5120, (27648, 27648), rows=4)
    assert all(config.dense for config in candidates(product, dense=True))
    assert list(candidates(product, dense=True))


def test_a_tile_config_that_cannot_be_launched_is_passed_over() -> None:
    errors = pytest.importorskip("triton.runtime.errors")

    def launch(index: int, thresholds: Any, config: TileConfig) -> None:
        if config.warps == 2:
            raise errors.OutOfResources(135168, 101376, "shared memory")
        if config.warps == 4:
            raise RuntimeError("an illegal memory access was encountered")

    product: Any = SimpleNamespace(launch=launch)
    assert tune._launches(product, TILE, torch.zeros(1))
    assert not tune._launches(product, replace(TILE, warps=2), torch.zeros(1))
    with pytest.raises(RuntimeError, match="illegal"):
        tune._launches(product, replace(TILE, warps=4), torch.zeros(1))


def test_where_no_tile_config_can_be_launched_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = pytest.importorskip("triton.runtime.errors")

    def launch(index: int, thresholds: Any, config: TileConfig) -> None:
        raise errors.OutOfResources(135168, 101376, "shared memory")

    monkeypatch.setattr(tune, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(tune, "_compile", lambda product, configs, pool: None)
    product = _product(64, (64,), 1)
    product.launch, product.thresholds = launch, lambda sparsity: torch.full((1,), sparsity)
    pool: Any = None
    with pytest.raises(MachineError, match="tile configs of a product of 64 inputs and 64 outputs"):
        tune.search(product, [0.5], pool)


def test_the_model_has_the_last_word() -> None:
    found = [{s: [_entry(product, s, warps) for warps in (1, 2, 4)] for s in (0.0, 0.5)} for product in (FIRST, SECOND)]
    liked = {(FIRST, 0.0): 4, (FIRST, 0.5): 2, (SECOND, 0.0): 1, (SECOND, 0.5): 4}
    asked = []

    def token_seconds(sparsity: float) -> float:
        """The tile configs of the moment, as a session would choose them; each that is liked saves a second."""
        asked.append(sparsity)
        return 3.0 - sum(_chosen(p, sparsity).warps == liked[p, sparsity] for p in (FIRST, SECOND))

    entries = settle(found, token_seconds)
    got = {((e.inputs, e.outputs, e.epilogue), e.sparsity): e.config.warps for e in entries}
    assert got == liked
    assert sorted(asked) == [0.0] * 6 + [0.5] * 8  # read whole, too


def test_a_product_is_read_whole_where_that_has_the_faster_token() -> None:
    found = [{sparsity: [_entry(product, sparsity, 1)] for sparsity in (0.0, 0.5)} for product in (FIRST, SECOND)]

    def token_seconds(sparsity: float) -> float:
        """Faster where FIRST is read whole and SECOND skips, though each skips faster than it is read."""
        return 3.0 - _chosen(FIRST, sparsity).dense - 0.5 * (not _chosen(SECOND, sparsity).dense)

    entries = settle(found, token_seconds)
    with trying(entries):
        assert [_chosen(product, 0.5).dense for product in (FIRST, SECOND)] == [True, False]
    whole = next(entry for entry in entries if entry.product[0] == FIRST[0] and entry.sparsity)
    assert whole.cost == 10.0
    assert whole.deciding_because == "a token was faster where this product was read whole"


def test_a_search_keeps_what_is_chosen_today(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it is slower by itself than all others, and no candidate."""
    today = replace(TILE, block_out=16)
    entries = [Entry(64, (64,), "bfloat16", 1, "plain", s, 9.0 - s, replace(today, dense=s == 0.0)) for s in (0.0, 0.5)]
    keep_entries(entries, "cpu", Provenance())
    monkeypatch.setattr(tune, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(tune, "_compile", lambda product, configs, pool: None)
    product = _product(64, (64,), 1)
    product.epilogue = "plain"
    product.chosen_config = partial(TimedProduct.chosen_config, product)
    product.launch = lambda index, thresholds, config: None
    product.thresholds = lambda sparsity: torch.full((1,), sparsity)
    product.time = lambda config, thresholds: SimpleNamespace(median=30.0 if config.block_out == 16 else 10.0)
    pool: Any = None
    found = tune.search(product, [0.5], pool)
    for sparsity in (0.0, 0.5):
        first, *others = found[sparsity]
        assert first.config == replace(today, dense=sparsity == 0.0)
        assert {entry.microseconds for entry in others} == {10.0}


@pytest.mark.parametrize(("of_the_sparse_token", "skips"), [(0.9, True), (1.1, False)])
def test_skipping_that_does_not_pay_in_the_model_is_not_done(of_the_sparse_token: float, skips: bool) -> None:
    found = [{sparsity: [_entry(product, sparsity, 1)] for sparsity in (0.0, 0.5)} for product in (FIRST, SECOND)]
    entries = settle(found, lambda sparsity: of_the_sparse_token if sparsity else 1.0)
    with trying(entries):
        assert [not _chosen(product, 0.5).dense for product in (FIRST, SECOND)] == [skips] * 2
    sparse = [entry for entry in entries if entry.sparsity]
    assert [entry.cost for entry in sparse] == [7.5 if skips else 11.0] * 2
    assert [entry.microseconds for entry in sparse] == [7.5] * 2  # as measured, whatever decides
    because = None if skips else "a token that skips took 1.100 times as long as a dense one"
    assert [entry.deciding_because for entry in sparse] == [because] * 2


def test_trying_goes_before_every_table_and_ends() -> None:
    keep_entries([_entry(FIRST, 0.0, 1), _entry(FIRST, 0.5, 1), _entry(SECOND, 0.0, 1)], "cpu", Provenance())
    with trying([_entry(FIRST, 0.0, 4), _entry(FIRST, 0.5, 2)]):
        assert (_chosen(FIRST, 0.0).warps, _chosen(FIRST, 0.5).warps) == (4, 2)
        assert _chosen(SECOND, 0.0).warps == 1  # not tried: the table's
    with pytest.raises(KeyError), trying([_entry(FIRST, 0.0, 4)]):
        raise KeyError
    assert (_chosen(FIRST, 0.0).warps, _chosen(FIRST, 0.5).warps) == (1, 1)
