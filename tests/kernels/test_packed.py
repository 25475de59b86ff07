"""Products of quantised weights against their definition in float64."""

import itertools
from dataclasses import replace

import pytest
import torch
from attention_cases import PartialsCase
from covering import covering
from kernel_cases import PARTS, random_case, random_packed, relative_error

from teal_kernels.operands import Scratch
from teal_kernels.packed_linear import (
    byte_table,
    cpu_packed_linear,
    fitting,
    reference_packed_linear,
    triton_packed_linear,
)
from teal_kernels.packing import codes_of, dequantised, pack, side_by_side
from teal_kernels.triton_gemv import TileConfig, gemv
from teal_kernels.tuning import UNTUNED

INPUTS = 200
WEIGHTS = [(8, INPUTS, False), (8, 64, True), (4, 64, True), (4, 32, True), (4, 64, False)]
CONFIGS = {
    "one group": TileConfig(block_out=32, block_in=4, unroll=2, inputs_per_chunk=32, warps=1),
    "several groups": TileConfig(block_out=64, block_in=4, unroll=2, inputs_per_chunk=128, warps=1),
}


@pytest.mark.parametrize(("bits", "group", "zeros"), WEIGHTS)
@pytest.mark.parametrize("parts", [(19, 9, 5), (32,)], ids=str)
def test_codes_come_back(parts: tuple[int, ...], bits: int, group: int, zeros: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    codes = [torch.randint(0, 1 << bits, (INPUTS, part), generator=generator, dtype=torch.uint8) for part in parts]
    scales = torch.rand(-(-INPUTS // group), sum(parts), generator=generator)
    packed = side_by_side(
        [
            pack(code, scale, None, bits=bits, group=group)
            for code, scale in zip(codes, scales.split(parts, dim=1), strict=True)
        ]
    )
    assert torch.equal(codes_of(packed), torch.cat(codes, dim=1))
    assert packed.words.shape == (INPUTS, sum(-(-part * bits // 32) for part in parts))
    row = INPUTS - 1  # the last group is short
    expected = (torch.cat(codes, dim=1)[row].double() - (1 << bits - 1)) * scales[row // group]
    torch.testing.assert_close(dequantised(packed, torch.float64)[row], expected)


@covering(weights=WEIGHTS, epilogue=list(PARTS), config=list(CONFIGS), rows=[1, 2, 3], dense=[False, True])
def test_kernel_against_float64(
    weights: tuple[int, int, bool], epilogue: str, config: str, rows: int, dense: bool
) -> None:
    case = random_case(
        epilogue, rows, norm=epilogue != "residual", bias=False, listed=not dense, inputs=INPUTS, packed=weights
    )
    result = case.launch(replace(CONFIGS[config], dense=dense))
    # Codes are added up with their offset: more is cancelled than in a product of plain weights.
    assert relative_error(result.y, case.expected()) < 5e-6
    if epilogue == "residual":
        torch.testing.assert_close(result.squares.sum(1), result.y.square().sum(1))


@covering(rows=[1, 2], weights=WEIGHTS, config=list(CONFIGS), dense=[False, True])
def test_codes_of_16_bit_inputs(rows: int, weights: tuple[int, int, bool], config: str, dense: bool) -> None:
    """They are multiplied with fewer bits to spare, of which rounding the result must leave nothing to be seen."""
    case = random_case(
        "plain", rows, dtype=torch.float16, norm=False, bias=False, listed=not dense, inputs=INPUTS, packed=weights
    )
    y = case.launch(replace(CONFIGS[config], dense=dense)).y
    expected = case.expected()
    assert relative_error(y, expected) < 1.05 * relative_error(expected.to(torch.float16), expected)


@covering(
    epilogue=list(PARTS),
    rows=[1, 2, 3],
    dense=[False, True],
    weights=[(8, INPUTS, False), (4, 64, True), (4, 32, True)],
    config=list(CONFIGS),
)
@pytest.mark.usefixtures("narrow_warps")
def test_inputs_taken_vector_by_vector(
    epilogue: str, rows: int, dense: bool, weights: tuple[int, int, bool], config: str
) -> None:
    """But by three rows read whole, which are normalised and added up as they are multiplied."""
    case = random_case(
        epilogue, rows, norm=epilogue != "residual", listed=not dense, inputs=INPUTS, packed=weights, seed=3
    )
    result = case.launch(replace(CONFIGS[config], dense=dense))
    assert relative_error(result.y, case.expected()) < 5e-6


@covering(weights=[(8, 64, True), (4, 32, True)], config=list(CONFIGS), rows=[1, 2, 3], dense=[False, True])
def test_partials_are_merged(weights: tuple[int, int, bool], config: str, rows: int, dense: bool) -> None:
    PartialsCase(rows, 8, 24, 100, split_multiple=16, outputs=40, packed=weights).check(
        replace(CONFIGS[config], dense=dense)
    )


@covering(weights=WEIGHTS, threshold=[-1.0, 0.7, 100.0], rows=[0, 1, 2, 3])
def test_layer_products_agree(weights: tuple[int, int, bool], threshold: float, rows: int) -> None:
    bits, group, zeros = weights
    packed = random_packed(INPUTS, (21,), bits, group, zeros=zeros)
    x = torch.randn(rows, INPUTS, generator=torch.Generator().manual_seed(3))
    bias, limit = torch.randn(21, generator=torch.Generator().manual_seed(4)), torch.tensor(threshold)
    expected = reference_packed_linear(x.double(), packed, bias.double(), limit.double())
    on_cpu = cpu_packed_linear(x, byte_table(packed), packed, bias, limit)
    on_gpu = triton_packed_linear(x, packed, bias, limit, UNTUNED)
    for y in (on_cpu, on_gpu):
        assert y.shape == expected.shape
        assert float((y - expected).norm()) <= 5e-6 * float(expected.norm())


def test_what_does_not_fit_is_refused() -> None:
    packed = random_packed(INPUTS, (16,), 4, 64, zeros=True)
    x, y = torch.zeros(1, INPUTS), torch.zeros(1, 16)
    for config in (TileConfig(32, 4, 2, 96, 1), TileConfig(32, 4, 2, 48, 1)):
        with pytest.raises(ValueError, match="one must divide the other"):
            gemv(x, packed, (16,), torch.zeros(1), y, config, Scratch(x.device))
        fitted = fitting(config, packed, 1)
        gemv(x, packed, (16,), torch.zeros(1), y, fitted, Scratch(x.device))
    with pytest.raises(ValueError, match="do not fit"):
        pack(torch.zeros(8, 8, dtype=torch.uint8), torch.ones(3, 8), None, bits=4, group=4)
    with pytest.raises(ValueError, match="different ways"):
        side_by_side([packed, random_packed(INPUTS, (16,), 8, 64, zeros=True)])


def test_a_block_is_as_wide_as_what_takes_its_words() -> None:
    packed = random_packed(INPUTS, (64,), 4, 64, zeros=True)
    config = TileConfig(block_out=32, block_in=4, unroll=2, inputs_per_chunk=32, warps=1)
    assert [fitting(config, packed, rows).block_out for rows in (1, 2, 3, 8)] == [32, 32, 128, 128]


def test_parts_borders_hold_their_own_thresholds() -> None:
    """Outputs beside a border of two parts, where a block or a word that went on would take the other's threshold."""
    packed = random_packed(INPUTS, (19, 9, 5), 4, 64, zeros=True)
    x = torch.randn(1, INPUTS, generator=torch.Generator().manual_seed(5))
    thresholds = torch.tensor([-1.0, 100.0, -1.0])
    y = torch.full((1, 33), 7.0)
    gemv(x, packed, packed.parts, thresholds, y, CONFIGS["one group"], Scratch(x.device))
    starts = list(itertools.accumulate(packed.parts))
    assert torch.equal(y[:, starts[0] : starts[1]], torch.zeros(1, 9))
    assert bool((y[:, : starts[0]] != 0).all() and (y[:, starts[1] :] != 0).all())
