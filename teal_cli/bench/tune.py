"""Search for the tile configs of products: `teal bench --kernels --tune`, and the packaged tables."""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing import get_context

import torch
from torch import Tensor

from teal_cli.bench.products import TimedProduct
from teal_cli.errors import MachineError
from teal_kernels.launching import LEAST_TILE, compiling, multiprocessors, uses_fma
from teal_kernels.packed_linear import fitting
from teal_kernels.packing import bits_of
from teal_kernels.triton_gemv import TileConfig
from teal_kernels.tuning import UNTUNED, trying
from teal_kernels.tuning_entries import Entry, kind_of

_COMPILERS = 12
_FREE_FOR_ONE = 4 << 30
"""Bytes free on the GPU for each process that compiles."""
_FINALISTS = 3
_TRIED = 4
"""Tile configs of a product that are tried in the model, at most."""
_LEVEL = 1.1
"""Those that took so many times as long as the fastest are not. Of all that were measured, the one furthest behind by
itself that won in a token took 1.09 times as long (`o` at 65 %, H100)."""


def candidates(product: TimedProduct, *, dense: bool) -> Iterator[TileConfig]:
    """Tile configs worth timing: loads of 16 bytes a thread, several in flight, programs for the whole GPU at once.

    Of a batch, whose programs have more to do beside reading, fewer programs and longer chunks of inputs too.

    More programs than a GPU holds at a time would run in waves, with an idle tail each. A product too
    small to fill it is divided as finely as can be.
    """
    processors = multiprocessors(product.device)
    outputs = sum(product.parts)
    small = outputs // 64 * -(-product.inputs // 128) < 8 * processors
    one = product.rows == 1
    fewest = min((4 if one else 3) * processors, outputs // 32 * -(-product.inputs // 64) // 2)
    found = False
    table = product.tables[0]
    bits = bits_of(table)
    # Of half bytes, whose sums take twice the registers of bytes', on the FMA path 8 or 16.
    tiles = _tiles(min(16, 128 // bits)) if uses_fma(product.rows, bits) else _batch_tiles(128 // bits)
    chunks = _CHUNKS if one else _BATCH_CHUNKS
    for (block_out, block_in, unroll, warps), per_chunk in itertools.product(tiles, chunks):
        if per_chunk < 2 * block_in * unroll or (not small and (block_out < 64 or per_chunk < 128)):
            continue
        programs = -(-product.inputs // per_chunk) * sum(-(-part // block_out) for part in product.parts)
        if fewest <= programs * warps <= 34 * processors:
            config = TileConfig(block_out, block_in, unroll, per_chunk, warps, dense=dense)
            if fitting(config, table, product.rows) == config:
                found = True
                yield config
    if not found:  # a product larger than such a GPU was thought to hold
        yield replace(UNTUNED, dense=dense)


_BLOCKS = (32, 64, 128, 256, 512)
_CHUNKS = (64, 128, 256, 512, 1024)
_BATCH_CHUNKS = (*_CHUNKS, 2048, 4096)
"""Inputs of a program. What tensor cores read whole has no list to make, and each program sends sums for every row."""


def _tiles(lane: int) -> Iterator[tuple[int, int, int, int]]:
    """(block_out, block_in, unroll, warps) of tiles for the FMA path: one or two loads a thread.

    Of 158 products of one row that were measured on an H100 and an H200, 152 are fastest with one warp, and 6, all but
    one with 512 outputs a program, with more.
    """
    for block_out, warps, (loads, unroll) in itertools.product(
        _BLOCKS, (1, 2), ((1, 4), (1, 6), (1, 8), (2, 4), (2, 6))
    ):
        block_in = loads * lane * 32 * warps // block_out
        if block_in >= 1 and (warps == 1 or block_out >= 512):
            yield block_out, block_in, unroll, warps


def _batch_tiles(lane: int) -> Iterator[tuple[int, int, int, int]]:
    """The same for tensor cores."""
    for block_out, warps, block_in, unroll in itertools.product(
        _BLOCKS[:-1], (1, 2, 4), (LEAST_TILE, 2 * LEAST_TILE, 4 * LEAST_TILE), (1, 2, 4)
    ):
        loads = block_out * block_in // (lane * 32 * warps)
        if loads >= 1 and 4 <= loads * unroll <= 16:
            yield block_out, block_in, unroll, warps


Finalists = dict[float, list[Entry]]
"""The best tile configs of one product, fastest first, for each sparsity; 0 is the dense read."""


def compilers(device: torch.device) -> Executor:
    """Processes that compile candidates into triton's cache on disk; they start when there is work.

    Each holds some memory of the GPU, so where little is free there are few.
    """
    free, _ = torch.cuda.mem_get_info(device)
    workers = min(_COMPILERS, os.cpu_count() or 1, free // _FREE_FOR_ONE)
    return ProcessPoolExecutor(max(1, workers), mp_context=get_context("spawn"))


def search(product: TimedProduct, sparsities: Sequence[float], pool: Executor) -> Finalists:
    """Time the candidates of one product by itself.

    All are timed at the middle sparsity, the best few at every sparsity, with weights that leave the L2 cache first,
    and the very best without, too. What is chosen today is among the finalists, so that a search makes nothing worse.
    """
    middle = sorted(sparsities)[len(sparsities) // 2]
    first = {dense: list(candidates(product, dense=dense)) for dense in (True, False)}
    _compile(product, [*first[True], *first[False]], pool)
    finalists = {}
    for dense, configs in first.items():
        best = [entry.config for entry in _ranked(product, configs, 0.0 if dense else middle)[:_FINALISTS]]
        finalists[dense] = [*best, replace(best[0], evict_first=False)]
    of_today = {sparsity: product.chosen_config(sparsity) for sparsity in (0.0, *sparsities)}
    new = [config for config in of_today.values() if config not in first[config.dense]]
    _compile(product, [finalists[True][-1], finalists[False][-1], *dict.fromkeys(new)], pool)
    found = {}
    for sparsity, config in of_today.items():
        dense = sparsity == 0.0
        own = [config] if config.dense == dense else []
        configs = list(dict.fromkeys([*own, *finalists[dense]]))
        found[sparsity] = _worth_trying(_ranked(product, configs, sparsity), own)
    return found


def _worth_trying(ranked: list[Entry], of_today: list[TileConfig]) -> list[Entry]:
    """What is chosen today first, then the fastest."""
    level = [entry for entry in ranked if entry.cost <= _LEVEL * ranked[0].cost][:_TRIED]
    return list(dict.fromkeys([*(entry for entry in ranked if entry.config in of_today), *level]))


def settle(found: Sequence[Finalists], token_seconds: Callable[[float], float]) -> list[Entry]:
    """Choose among the finalists of all products by the time of a token.

    Kernels that alternate rank otherwise than one that follows itself: what one leaves in the caches,
    and where it lets the next begin, counts. So does whether a product skips: one that is read whole beside others that
    skip can cost more than both say by themselves, or less. Where the token is no faster than the dense one, no
    product may be chosen as faster: its `deciding_microseconds` are as much above the dense read's.

    Args:
        found: of each product; the first of its entries are in force at the start.
        token_seconds: a sparsity to the time of a token at it, by whatever tile configs are chosen at the time.

    Returns:
        One entry for each product and sparsity.
    """
    best = [{sparsity: entries[0] for sparsity, entries in finalists.items()} for finalists in found]
    settled: dict[float, float] = {}  # seconds of a token with what is chosen so far
    for index, finalists in enumerate(found):
        for sparsity, entries in finalists.items():
            seconds = {}
            if sparsity:
                entries = [*entries, _read_whole(entries[0], best[index][0.0])]
            for entry in entries:
                best[index][sparsity] = entry
                with trying(chosen for product in best for chosen in product.values()):
                    seconds[entry] = token_seconds(sparsity)
            fastest = min(entries, key=seconds.__getitem__)
            best[index][sparsity] = fastest
            settled[sparsity] = seconds[fastest]
    return [
        _as_in_the_model(entry, product[0.0], settled[sparsity] / settled[0.0])
        for product in best
        for sparsity, entry in product.items()
    ]


def _read_whole(entry: Entry, dense: Entry) -> Entry:
    """An entry by which the product is read whole at its sparsity."""
    return replace(
        entry,
        deciding_microseconds=max(entry.cost, dense.cost),
        deciding_because="a token was faster where this product was read whole",
    )


def _as_in_the_model(entry: Entry, dense: Entry, longer: float) -> Entry:
    """An entry whose token took so many times as long as the dense one; `dense` is of the same product."""
    deciding = round(dense.cost * longer, 2)
    if entry.config.dense or longer < 1.0 or entry.cost >= deciding:
        return entry
    because = f"a token that skips took {longer:.3f} times as long as a dense one"
    return replace(entry, deciding_microseconds=deciding, deciding_because=because)


def _ranked(product: TimedProduct, configs: list[TileConfig], sparsity: float) -> list[Entry]:
    """Fastest first.

    Raises:
        MachineError: none of them runs here.
    """
    thresholds = product.thresholds(sparsity)
    entries = [
        Entry(
            inputs=product.inputs,
            outputs=product.parts,
            dtype=kind_of(product.tables[0]),
            rows=product.rows,
            epilogue=product.epilogue,
            sparsity=sparsity,
            microseconds=round(product.time(config, thresholds).median, 2),
            config=config,
        )
        for config in configs
        if _launches(product, config, thresholds)
    ]
    if not entries:
        raise MachineError(
            f"none of {len(configs)} tile configs of a product of {product.inputs} inputs and {sum(product.parts)} "
            "outputs compiles and has room on this GPU: another version of triton may be needed"
        )
    return sorted(entries, key=lambda entry: entry.cost)


def _launches(product: TimedProduct, config: TileConfig, thresholds: Tensor) -> bool:
    """Whether a tile config can be compiled and has room on this GPU."""
    try:
        product.launch(0, thresholds, config)
    except Exception as error:
        if type(error).__module__.startswith("triton") or "PassManager" in str(error):
            return False
        raise
    return True


def _compile(product: TimedProduct, configs: list[TileConfig], pool: Executor) -> None:
    """Compile in other processes; what fails fails again when it is timed."""
    small = partial(
        TimedProduct,
        product.inputs,
        product.parts,
        product.epilogue,
        dtype=product.dtype,
        rows=product.rows,
        device=product.device,
        scheme=product.scheme,
        rotated_bytes=1,
    )
    jobs = [pool.submit(_compile_some, small, configs[start::_COMPILERS]) for start in range(_COMPILERS)]
    for job in jobs:
        with suppress(BrokenProcessPool):
            job.result()


def _compile_some(build: Callable[[], TimedProduct], configs: list[TileConfig]) -> None:
    with suppress(Exception):
        product = build()
        thresholds = product.thresholds(0.0)
        with compiling(threads=1):
            for config in configs:
                with suppress(Exception):
                    product.launch(0, thresholds, config)
        del product
        torch.cuda.empty_cache()
