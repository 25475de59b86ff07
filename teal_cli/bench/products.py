"""One product on the GPU, timed as decoding meets it: weights out of cache, inside a CUDA graph."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from teal_cli.bench.timing import Spread, graph_microseconds
from teal_cli.schemes import Scheme
from teal_kernels import active_inputs
from teal_kernels.launching import hopper_or_later
from teal_kernels.operands import Norm, Scratch
from teal_kernels.packed_linear import fitting
from teal_kernels.packing import Packed
from teal_kernels.triton_gemv import TileConfig, gemv, squares_of
from teal_kernels.tuning import choose_config
from teal_kernels.tuning_entries import kind_of

_ROTATED_BYTES = 4_000_000_000
"""Copies of the weight are used in turn until this much was read. Several times the L2 is not enough:
weights that are evicted first leave the L2 full of older ones, and at 400 MB a tenth of the reads hit."""
_EPS = 1e-5


@dataclass(frozen=True)
class ProductShape:
    """What a product is, without its weights."""

    inputs: int
    parts: tuple[int, ...]
    """Outputs of each projection."""
    epilogue: str
    """What follows, as `gemv` takes it."""
    scheme: Scheme | None = None
    """How the weights are quantised, if they are."""

    def timed(self, *, dtype: torch.dtype, rows: int, device: torch.device, seed: int) -> "TimedProduct":
        """The product with random weights."""
        return TimedProduct(
            self.inputs,
            self.parts,
            self.epilogue,
            dtype=dtype,
            rows=rows,
            device=device,
            seed=seed,
            scheme=self.scheme,
        )


class TimedProduct:
    """The projections that read one hidden state, with random weights.

    Args:
        inputs: of the product.
        parts: outputs of each projection.
        epilogue: what follows, as `gemv` takes it; anything but `residual` has an RMS norm in front.
        dtype: of weights and inputs.
        rows: tokens decoded together; each row drops inputs of its own.
        device: a GPU.
        seed: of weights and inputs.
        scheme: how the weights are quantised, if they are.
        rotated_bytes: how much is read before a copy of the weights is read again.
    """

    def __init__(
        self,
        inputs: int,
        parts: tuple[int, ...],
        epilogue: str,
        *,
        dtype: torch.dtype,
        rows: int,
        device: torch.device,
        seed: int = 0,
        scheme: Scheme | None = None,
        rotated_bytes: int = _ROTATED_BYTES,
    ) -> None:
        self.inputs, self.parts, self.epilogue, self.rows = inputs, parts, epilogue, rows
        self.device, self.dtype, self.scheme = device, dtype, scheme
        generator = torch.Generator(device).manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

        self.tables: list[Tensor | Packed] = []
        self.bytes = 0
        """Of one copy of the weights, with their scales."""
        while not self.tables or len(self.tables) < max(2, -(-rotated_bytes // self.bytes)):
            if scheme is None:
                self.tables.append(random(inputs, sum(parts)))
            else:
                self.tables.append(_random_codes(inputs, parts, scheme, generator))
            self.bytes = self.tables[0].nbytes
        self.x = random(rows, inputs)
        self.norm: Norm | None = None
        seen = self.x
        if epilogue != "residual":
            squares = self.x.float().square().sum(-1, keepdim=True)
            self.norm = Norm(random(inputs).abs() + 0.5, _EPS, squares)
            seen = (self.x.float() * torch.rsqrt(squares / inputs + _EPS)).to(dtype) * self.norm.weight
        self.seen = seen
        """(rows, inputs): what the threshold is compared with."""
        self.y = torch.zeros(rows, parts[0] if epilogue == "gated" else sum(parts), device=device, dtype=dtype)
        self.scratch = Scratch(device)
        self.pdl = hopper_or_later(device)

    def thresholds(self, sparsity: float) -> Tensor:
        """(parts,) float32 that drop this share of the inputs, -1 for none."""
        value = self.seen.abs().float().quantile(sparsity) if sparsity > 0 else torch.tensor(-1.0, device=self.device)
        return value.repeat(len(self.parts))

    def chosen_config(self, sparsity: float) -> TileConfig:
        """What the tuning tables give for it, where each row drops this share of the inputs."""
        config = choose_config(
            self.device,
            inputs=self.inputs,
            parts=self.parts,
            dtype=kind_of(self.tables[0]),
            rows=self.rows,
            epilogue=self.epilogue,
            sparsity=sparsity,
        )
        return fitting(config, self.tables[0], self.rows)

    def read_share(self, thresholds: Tensor) -> tuple[float, float]:
        """Share of the weights that some row needs; realised sparsity of the rows."""
        active = active_inputs(self.seen, thresholds[0])
        return float(active.any(0).float().mean()), 1.0 - float(active.float().mean())

    def launch(self, index: int, thresholds: Tensor, config: TileConfig) -> None:
        """One product with the index-th copy of the weights."""
        gemv(
            self.x,
            self.tables[index % len(self.tables)],
            self.parts,
            thresholds,
            self.y,
            config,
            self.scratch,
            norm=self.norm,
            epilogue=self.epilogue,
            squares=self._squares(config) if self.epilogue == "residual" else None,
            pdl=self.pdl,
        )

    def _squares(self, config: TileConfig) -> Tensor:
        columns = squares_of(self.tables[0], self.parts, config, self.rows, self.dtype)
        return self.scratch.tensor("squares", self.rows * columns, torch.float32)[: self.rows * columns].view(
            self.rows, columns
        )

    def time(self, config: TileConfig, thresholds: Tensor) -> Spread:
        """Microseconds a launch."""
        return self._time(lambda index: self.launch(index, thresholds, config))

    def time_cublas(self) -> Spread:
        """Microseconds of `torch.nn.functional.linear` alone, on row-major weights."""
        shape = (sum(self.parts), self.inputs)
        copies = max(2, -(-_ROTATED_BYTES // (math.prod(shape) * self.dtype.itemsize)))
        weights = [torch.randn(shape, device=self.device, dtype=self.dtype) for _ in range(copies)]
        return self._time(lambda index: F.linear(self.seen, weights[index % len(weights)]))

    def _time(self, launch: Callable[[int], object]) -> Spread:
        return graph_microseconds(launch, max(16, len(self.tables)))


def _random_codes(inputs: int, parts: tuple[int, ...], scheme: Scheme, generator: torch.Generator) -> Packed:
    """Quantised weights as they come: any bits, scales around those of normal weights."""
    device = generator.device
    words = sum(-(-part * scheme.bits // 32) for part in parts)
    groups, total = -(-inputs // scheme.group_of(inputs)), sum(parts)
    scales = torch.rand(groups, total, generator=generator, device=device) / (1 << scheme.bits - 2)
    zeros = torch.rand(groups, total, generator=generator, device=device) * (1 << scheme.bits)
    return Packed(
        torch.randint(-(1 << 31), 1 << 31, (inputs, words), generator=generator, device=device).to(torch.int32),
        scales.half() if scheme.group else scales,
        zeros.half() if scheme.has_zeros else None,
        scheme.bits,
        scheme.group_of(inputs),
        parts,
    )


_READ_ELEMENTS = 1 << 29
_fastest_readings: dict[torch.device, float] = {}


def reading_gb_s(device: torch.device) -> float:
    """What this GPU reads from memory at most, as far as this process has measured: 1e9 bytes a second.

    Whatever disturbs a reading makes it slower, so an earlier one counts that was faster: of seven in one process, one
    was 2.6 TB/s and the others 3.1 (H100).
    """
    data = torch.empty(_READ_ELEMENTS, dtype=torch.float32, device=device).normal_()
    # In a graph, so that a busy host does not count.
    reading = data.nbytes / graph_microseconds(lambda _: torch.amax(data), 2).min / 1e3
    _fastest_readings[device] = max(reading, _fastest_readings.get(device, 0.0))
    return _fastest_readings[device]
