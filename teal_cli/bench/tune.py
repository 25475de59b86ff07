"""Search for the cuts of products: `teal bench --kernels --tune`, and the packaged tables."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
import triton

from teal_cli.bench.products import Product
from teal_kernels.triton_gemv import GemvConfig
from teal_kernels.tuning import Entry

_COMPILERS = 12
_FINALISTS = 3
_AHEAD = (0, 8, 16)


def candidates(product: Product, *, dense: bool) -> Iterator[GemvConfig]:
    """Cuts worth timing: loads of 16 bytes a thread, several in flight, programs for the whole GPU at once.

    More programs than a GPU holds at a time would run in waves, with an idle tail each.
    """
    lane = 16 // product.dtype.itemsize
    processors = torch.cuda.get_device_properties(product.device).multi_processor_count
    smallest = None
    for block_out, warps, (loads, unroll), per_split in itertools.product(
        (64, 128, 256, 512), (1, 2, 4), ((1, 4), (1, 8), (2, 2), (2, 4)), (128, 256, 512, 1024)
    ):
        block_in = loads * lane * 32 * warps // block_out
        if block_in < 1 or per_split < 2 * block_in * unroll or (warps == 4 and block_out < 256):
            continue
        if product.rows > 2 and loads * unroll > 4:
            continue  # the sums of every row are held in registers
        config = GemvConfig(block_out, block_in, unroll, per_split, warps, ahead=8, dense=dense)
        programs = -(-product.inputs // per_split) * sum(-(-part // block_out) for part in product.parts)
        smallest = smallest or config
        if 4 * processors <= programs * warps <= 34 * processors:
            smallest = config
            yield config
    if smallest is not None and 4 * processors > sum(product.parts) // 64 * -(-product.inputs // 128):
        yield smallest  # a product too small to fill this GPU in any way


def search(
    product: Product, sparsities: Sequence[float], on_config: Callable[[int], None] = lambda done: None
) -> list[Entry]:
    """Time the candidates; the best dense one, and the best one for each sparsity.

    All are timed at the middle sparsity, the best few at every sparsity with several amounts of
    fetching ahead.
    """
    entries = []
    middle = sorted(sparsities)[len(sparsities) // 2]
    for dense in (True, False):
        at = [0.0] if dense else list(sparsities)
        first = _ranked(product, list(candidates(product, dense=dense)), 0.0 if dense else middle, on_config)
        finalists = [
            replace(config, ahead=ahead, evict_first=evict)
            for config, ahead, evict in itertools.product(first[:_FINALISTS], _AHEAD, (True, False))
        ]
        _compile(product, finalists)
        for sparsity in at:
            thresholds = product.thresholds(sparsity)
            best = min(finalists, key=lambda config: product.time(config, thresholds).median)
            entries.append(
                Entry(
                    inputs=product.inputs,
                    outputs=product.parts,
                    dtype=str(product.dtype).removeprefix("torch."),
                    rows=product.rows,
                    finish=product.finish,
                    sparsity=sparsity,
                    microseconds=round(product.time(best, thresholds).median, 2),
                    config=best,
                )
            )
            on_config(len(finalists))
    return entries


def _ranked(
    product: Product, configs: list[GemvConfig], sparsity: float, on_config: Callable[[int], None]
) -> list[GemvConfig]:
    """Fastest first."""
    _compile(product, configs)
    thresholds = product.thresholds(sparsity)
    times = {}
    for config in configs:
        times[config] = product.time(config, thresholds).median
        on_config(1)
    return sorted(configs, key=times.__getitem__)


def _compile(product: Product, configs: list[GemvConfig]) -> None:
    """Compile on several threads; what fails here fails again, with its error, when it is timed."""
    thresholds = product.thresholds(0.0)
    with ThreadPoolExecutor(_COMPILERS) as pool, triton.AsyncCompileMode(pool):
        for config in configs:
            product.launch(0, thresholds, config, compile_only=True)
