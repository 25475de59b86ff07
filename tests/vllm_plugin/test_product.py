"""The product of a layer that vLLM runs, against masked inputs in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from teal_cli.vllm_plugin.product import _on_gpu, note_rows, product, product_shape
from teal_kernels import KEEP_ALL, input_major, masked_input

PARTS = [40, 24, 8]
THRESHOLDS = [0.9, KEEP_ALL, 0.3]
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}


def _operands(rows: int, dtype: torch.dtype, *, bias: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, 65).to(dtype), input_major(torch.randn(sum(PARTS), 65).to(dtype))
    return x, weight, torch.randn(sum(PARTS)).to(dtype) if bias else None, torch.tensor(THRESHOLDS)


def _expected(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Each projection of the inputs that its own threshold keeps."""
    parts = zip(weight.double().split(PARTS), THRESHOLDS, strict=True)
    y = torch.cat([F.linear(masked_input(x, torch.tensor(t)).double(), part) for part, t in parts], dim=-1)
    return y if bias is None else y + bias.double()


def _error(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_one_row_skips_by_the_threshold_of_each_projection(dtype: torch.dtype, bias: bool) -> None:
    x, weight, of_bias, thresholds = _operands(1, dtype, bias=bias)
    y = product(x, weight, of_bias, thresholds, PARTS, 0.5)
    assert (y.shape, y.dtype) == ((1, sum(PARTS)), dtype)
    assert _error(y, _expected(x, weight, of_bias)) < LIMITS[dtype]
    assert _error(y, F.linear(x.double(), weight.double(), None if of_bias is None else of_bias.double())) > 0.05


def test_a_gpu_does_the_same() -> None:
    for dtype, limit in LIMITS.items():
        x, weight, bias, thresholds = _operands(1, dtype, bias=True)
        y = _on_gpu(x, weight, bias, thresholds, tuple(PARTS), 0.5)
        assert _error(y, _expected(x, weight, bias)) < limit
        dense = _on_gpu(x, weight, bias, thresholds, tuple(PARTS), 0.1)  # which does not pay
        assert torch.equal(dense, F.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("rows", [2, 9])
def test_several_rows_are_dense(rows: int, dtype: torch.dtype) -> None:
    x, weight, bias, thresholds = _operands(rows, dtype, bias=True)
    assert bias is not None
    expected = F.linear(x.double(), weight.double(), bias.double())
    assert _error(product(x, weight, bias, thresholds, PARTS, 0.5), expected) < LIMITS[dtype]
    assert product(x[:0], weight, bias, thresholds, PARTS, 0.5).shape == (0, sum(PARTS))


def test_compilers_are_told_the_shape() -> None:
    for rows in (1, 3):
        operands = (*_operands(rows, torch.bfloat16, bias=False), PARTS, 0.5)
        told, real = product_shape(*operands), product(*operands)
        assert (told.shape, told.dtype) == (real.shape, real.dtype)


def test_rows_are_noted_for_the_output_layer() -> None:
    thresholds = torch.zeros(1)
    for rows, wanted in ((1, 0.25), (2, KEEP_ALL), (1, 0.25)):
        note_rows(torch.zeros(rows, 8), thresholds, 0.25)
        assert thresholds.tolist() == [wanted]
