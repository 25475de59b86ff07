"""Search for the cuts of products: `teal bench --kernels --tune`, and the packaged tables."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from teal_cli.bench.products import Product
from teal_kernels.triton_gemv import GemvConfig, triton
from teal_kernels.tuning import Entry

_COMPILERS = 12
_FINALISTS = 5
_AHEAD = (0, 8, 16, 32)


def candidates(product: Product, *, dense: bool) -> Iterator[GemvConfig]:
    """Cuts worth timing: enough programs to fill the GPU, loads of 16 bytes a thread, several in flight."""
    lane = 16 // product.dtype.itemsize
    processors = triton.runtime.driver.active.utils.get_device_properties(product.device.index or 0)[
        "multiprocessor_count"
    ]
    for block_out in (64, 128, 256, 512):
        for warps in (1, 2, 4):
            for loads, unroll in ((1, 4), (1, 8), (2, 2), (2, 4)):
                if product.rows > 2 and loads * unroll > 4:
                    continue  # the sums of every row are held in registers
                block_in = loads * lane * 32 * warps // block_out
                if block_in < 1:
                    continue
                for per_split in (128, 256, 512, 1024):
                    programs = -(-product.inputs // per_split) * -(-sum(product.parts) // block_out)
                    fits = 3 <= programs * warps / processors <= 40 and per_split >= 2 * block_in * unroll
                    if fits or programs <= 4:
                        yield GemvConfig(block_out, block_in, unroll, per_split, warps, 8, dense)


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
        finalists = [replace(c, ahead=a) for c in first[:_FINALISTS] for a in _AHEAD if a <= c.inputs_per_split // 2]
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
    mode = getattr(triton, "AsyncCompileMode", None)
    with ThreadPoolExecutor(_COMPILERS) as pool, mode(pool) if mode else contextlib.nullcontext():
        for config in configs:
            product.launch(0, thresholds, config, compile_only=True)
