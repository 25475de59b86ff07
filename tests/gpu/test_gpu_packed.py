"""Products of quantised weights on a real GPU: against float64, and the same bits on every run."""

from dataclasses import replace

import pytest
import torch
from attention_cases import PartialsCase
from kernel_cases import LIMITS, PARTS, PDL, random_case, random_packed, relative_error
from torch import Tensor

from teal_kernels import masked_input
from teal_kernels.operands import Scratch
from teal_kernels.packed_linear import fitting
from teal_kernels.packing import Packed, dequantised
from teal_kernels.triton_gemv import TileConfig, gemv
from teal_kernels.tuning import choose_config
from teal_kernels.tuning_entries import kind_of

SHAPES = [(4096, (4096, 1024, 1024)), (14336, (4096,)), (576, (576, 192, 192)), (200, (152, 72, 40))]
WEIGHTS = [(8, 0, False), (4, 128, True), (4, 32, True)]


def _run(x: Tensor, packed: Packed, thresholds: Tensor, config: TileConfig) -> Tensor:
    y = torch.empty(x.shape[0], sum(packed.parts), dtype=x.dtype, device=x.device)
    gemv(x, packed, packed.parts, thresholds, y, config, Scratch(x.device))
    return y


def _config(packed: Packed, rows: int, sparsity: float) -> TileConfig:
    config = choose_config(
        packed.device,
        inputs=packed.shape[0],
        parts=packed.parts,
        dtype=kind_of(packed),
        rows=rows,
        epilogue="plain",
        sparsity=sparsity,
    )
    return fitting(config, packed, rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize(("bits", "group", "zeros"), WEIGHTS)
@pytest.mark.parametrize(("inputs", "parts"), SHAPES, ids=str)
def test_against_float64(
    inputs: int,
    parts: tuple[int, ...],
    bits: int,
    group: int,
    zeros: bool,
    rows: int,
    sparsity: float,
    dtype: torch.dtype,
) -> None:
    packed = random_packed(inputs, parts, bits, group or inputs, zeros=zeros, device="cuda")
    x = torch.randn(rows, inputs, device="cuda", dtype=dtype, generator=torch.Generator("cuda").manual_seed(0)) / 64
    config = _config(packed, rows, sparsity)
    limit = x.abs().float().quantile(sparsity) if sparsity and not config.dense else torch.tensor(-1.0, device="cuda")
    y = _run(x, packed, limit.repeat(len(parts)), config)
    assert relative_error(y, masked_input(x, limit).double() @ dequantised(packed, torch.float64)) < LIMITS[dtype]


@pytest.mark.parametrize("per_split", [128, 512], ids=["one group", "several groups"])
@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("weights", [(8, 128, False), (4, 128, True), (4, 32, True)], ids=str)
def test_what_comes_before_and_after(weights: tuple[int, int, bool], rows: int, per_split: int) -> None:
    """Norms and heads of attention before a product, what follows it after."""
    config = TileConfig(block_out=128, block_in=8, unroll=2, inputs_per_chunk=per_split, warps=2)
    for dense in (False, True):
        for epilogue in PARTS:
            case = random_case(
                epilogue, rows, dtype=torch.bfloat16, listed=not dense, inputs=1000, packed=weights, device="cuda"
            )
            result = case.launch(replace(config, dense=dense), pdl=PDL)
            assert relative_error(result.y, case.expected()) < LIMITS[torch.bfloat16]
        merging = PartialsCase(rows, 16, 64, 700, dtype=torch.bfloat16, device="cuda", packed=weights)
        merging.check(replace(config, dense=dense), pdl=PDL)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(("bits", "group", "zeros"), WEIGHTS)
def test_same_bits_on_every_run(bits: int, group: int, zeros: bool, rows: int) -> None:
    packed = random_packed(4096, (4096, 1024, 1024), bits, group or 4096, zeros=zeros, device="cuda")
    x = torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16, generator=torch.Generator("cuda").manual_seed(0))
    thresholds, config = torch.full((3,), 0.67, device="cuda"), _config(packed, rows, 0.5)
    first = _run(x, packed, thresholds, config)
    assert all(torch.equal(_run(x, packed, thresholds, config), first) for _ in range(100))
