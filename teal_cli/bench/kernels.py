"""The sparse product of each projection shape, against the dense product, weights out of cache."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.benchmark import Timer

from teal_cli.bench.products import ProductShape
from teal_cli.bench.timing import Spread
from teal_kernels import active_inputs, input_major, resolve_backend, sparse_linear
from teal_kernels.packing import Packed

_ROTATED_BYTES = 512 << 20
"""Copies of the weight are used in turn until this much was touched: more than any cache here holds."""
_MAX_COPIES = 256
_MIN_SECONDS = 0.3


@dataclass(frozen=True)
class KernelRun:
    """One product."""

    out_features: int
    in_features: int
    backend: str
    """`dense` (torch's own product), or the backend that ran; on a GPU also `triton dense`, which skips nothing."""
    sparsity: float
    realised_sparsity: float
    microseconds: Spread
    gb_s: float
    """Bytes of the weights that had to be read, over the median time."""
    limit_gb_s: float | None
    """What the device's memory gives at most, measured; None on a CPU."""
    speedup: float
    """Dense median time over this one."""


def _time(statement: str, environment: dict[str, object]) -> Spread:
    """Microseconds a call; torch's timer warms up and synchronises."""
    measured = Timer(stmt=statement, globals=environment, num_threads=torch.get_num_threads()).blocked_autorange(
        min_run_time=_MIN_SECONDS
    )
    return Spread.of([seconds * 1e6 for seconds in measured.times])


@torch.no_grad()
def bench_kernels(
    shapes: Sequence[tuple[int, int]],
    sparsities: Sequence[float],
    *,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
) -> list[KernelRun]:
    """Time the dense product and the sparse one at each sparsity, for each (out, in) shape.

    Inputs are normal; their threshold is their own quantile, so that the sparsity is realised.
    """
    runs = []
    name = resolve_backend(backend, device, dtype)
    generator = torch.Generator(device=device).manual_seed(seed)
    for n_out, n_in in shapes:
        size = n_out * n_in * dtype.itemsize
        copies = max(1, min(_MAX_COPIES, _ROTATED_BYTES // size))
        weight = torch.randn(n_out, n_in, generator=generator, device=device).to(dtype)
        x = torch.randn(1, n_in, generator=generator, device=device).to(dtype)
        weights = itertools.cycle([weight.clone() for _ in range(copies)])
        environment = {"x": x, "weights": weights, "linear": torch.nn.functional.linear}
        dense = _time("linear(x, next(weights))", environment)
        runs.append(KernelRun(n_out, n_in, "dense", 0.0, 0.0, dense, size / dense.median / 1e3, None, 1.0))
        weights = itertools.cycle([input_major(weight) for _ in range(copies)])
        for sparsity in sparsities:
            threshold = x.abs().float().quantile(sparsity) if sparsity else torch.tensor(-1.0, device=device)
            active = int(active_inputs(x, threshold).sum())
            environment = {"x": x, "weights": weights, "t": threshold, "backend": name, "sparse_linear": sparse_linear}
            spread = _time("sparse_linear(x, next(weights), None, t, backend)", environment)
            read = active * n_out * dtype.itemsize
            runs.append(
                KernelRun(
                    n_out,
                    n_in,
                    name,
                    sparsity,
                    1 - active / n_in,
                    spread,
                    read / spread.median / 1e3,
                    None,
                    dense.median / spread.median,
                )
            )
    return runs


def bench_products(
    products: Sequence[ProductShape],
    sparsities: Sequence[float],
    *,
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    seed: int,
    limit_gb_s: float,
) -> list[KernelRun]:
    """Time the launches of decoding on a GPU, with the norm and the activation that they take up.

    Args:
        products: of a model.
        sparsities: targets; every row's inputs have their own quantile for a threshold.
        device: a GPU.
        dtype: of the weights.
        batch: rows.
        seed: of weights and inputs.
        limit_gb_s: what the memory gives at most.
    """
    runs = []
    for wanted in products:
        product = wanted.timed(dtype=dtype, rows=batch, device=device, seed=seed)
        fixed = product.tables[0].fixed_bytes if isinstance(product.tables[0], Packed) else 0
        shape = (sum(wanted.parts), wanted.inputs)
        cublas = product.time_cublas()
        runs.append(
            KernelRun(
                *shape,
                "dense",
                0.0,
                0.0,
                cublas,
                math.prod(shape) * dtype.itemsize / cublas.median / 1e3,
                limit_gb_s,
                1.0,
            )
        )
        for sparsity in (0.0, *sparsities):
            thresholds = product.thresholds(sparsity)
            config = product.chosen_config(sparsity)
            spread = product.time(config, thresholds)
            read, realised = product.read_share(thresholds)
            read = 1.0 if config.dense else read
            runs.append(
                KernelRun(
                    *shape,
                    "triton dense" if config.dense else "triton",
                    sparsity,
                    0.0 if config.dense else realised,
                    spread,
                    (fixed + (product.bytes - fixed) * read) / spread.median / 1e3,
                    limit_gb_s,
                    cublas.median / spread.median,
                )
            )
    return runs
