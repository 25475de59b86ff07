"""Products of codes by the native library, against float64. Of one row and 4 bits, AVX-512 rounds inputs to 16 bits."""

from math import inf, nan

import pytest
import torch
from covering import covering
from torch import Tensor

from teal_kernels.native import library
from teal_kernels.native import structures as native
from teal_kernels.packing import Packed, dequantised, pack

needs_the_library = pytest.mark.skipif(
    library.unavailable_reason() is not None, reason=library.unavailable_reason() or ""
)
BLOCK = 8
"""Inputs that are rounded together (`src/whole.h`)."""


def random_codes(inputs: int, outputs: int, bits: int, group: int, *, zeros: bool) -> Packed:
    groups = -(-inputs // group)
    codes = torch.randint(1 << bits, (inputs, outputs), dtype=torch.uint8)
    scales = torch.rand(groups, outputs).half() + 0.01
    points = (torch.rand(groups, outputs) * (1 << bits)).half() if zeros else None
    return pack(codes, scales, points, bits=bits, group=group)


def rounding(packed: Packed, x: Tensor, threshold: float) -> Tensor:
    """(out,) float64: what rounding to 16 bits can change, whichever kept inputs are rounded together.

    An input is off by at most half a step, and a step is 1 / 32,512 of the largest input of its block: the bound takes
    the largest one of its group.
    """
    kept = x.abs() > threshold
    x = torch.where(kept, x, 0).double()
    bound = torch.zeros(packed.shape[1], dtype=torch.float64)
    weights = dequantised(packed, torch.float64).abs()
    for first in range(0, len(x), packed.group):
        group = slice(first, first + packed.group)
        step = x[group].abs().max() / 32_512
        bound += 0.5 * step * (weights[group] * kept[group, None]).sum(0)
    return bound


@needs_the_library
@covering(
    2,
    bits=[4, 8],
    shape=[(32, 1), (64, 3), (65, 127), (96, 128), (100, 130), (200, 260), (9, 4_200)],
    group=[32, 64, 128, 1_000],
    zeros=[False, True],
    threshold=[-inf, 0.0, 0.7, 2.0, 9.0],
    rows=[1, 2, 3, 8],
    outlier=[False, True],
    threads=[1, 2],
)
def test_products(
    bits: int,
    shape: tuple[int, int],
    group: int,
    zeros: bool,
    threshold: float,
    rows: int,
    outlier: bool,
    threads: int,
) -> None:
    inputs, outputs = shape
    packed = random_codes(inputs, outputs, bits, group, zeros=zeros)
    x = torch.randn(rows, inputs)
    if outlier:
        x[:, inputs // 2] = 500.0
    exact = torch.where(x.abs() > threshold, x, 0).double() @ dequantised(packed, torch.float64)
    sums = x.double().abs() @ dequantised(packed, torch.float64).abs()
    bound = 4e-6 * (sums + x.double().abs().sum(1, keepdim=True) * (1 << bits) / 16)  # float32 sums of codes
    if bits == 4:
        bound = bound + torch.stack([rounding(packed, row, threshold) for row in x])
    for variant in library.load().variants:
        y = library.linear(native.weight_of(packed, threshold=threshold), x, threads, variant)
        assert ((y.double() - exact).abs() <= bound).all(), (variant, ((y.double() - exact).abs() / bound).max())


@needs_the_library
@pytest.mark.parametrize("odd", [nan, inf, -inf])
def test_what_is_no_number_stays_none(odd: float) -> None:
    packed = random_codes(64, 130, 4, 32, zeros=True)
    x = torch.randn(1, 64)
    x[0, 40] = odd
    for variant in library.load().variants:
        y = library.linear(native.weight_of(packed, threshold=0.5), x, 2, variant)
        assert not y.isfinite().any(), variant


@needs_the_library
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-33, 1e-20, 1e20, 1e34])
def test_inputs_of_any_size(size: float) -> None:
    packed = random_codes(64, 130, 4, 32, zeros=False)
    x = size * torch.randn(1, 64)
    exact = x.double() @ dequantised(packed, torch.float64)
    for variant in library.load().variants:
        y = library.linear(native.weight_of(packed), x, 2, variant)
        assert float((y.double() - exact).norm()) <= 1e-4 * float(exact.norm()) + 1e-28, variant


@needs_the_library
@pytest.mark.parametrize("kept", range(1, 2 * BLOCK + 2))
def test_every_number_of_kept_inputs(kept: int) -> None:
    packed = random_codes(64, 200, 4, 64, zeros=True)
    x = torch.zeros(1, 64)
    x[0, torch.randperm(64)[:kept]] = torch.randn(kept) + 2.0
    exact = x.double() @ dequantised(packed, torch.float64)
    for variant in library.load().variants:
        y = library.linear(native.weight_of(packed, threshold=0.0), x, 1, variant)
        assert float((y.double() - exact).norm()) <= 1e-4 * float(exact.norm()), variant
