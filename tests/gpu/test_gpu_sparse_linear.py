"""`sparse_linear` on a real GPU: the product that the general path and the evaluation take."""

import pytest
import torch

from teal_kernels import input_major, masked_input, reference_linear, resolve_backend, sparse_linear

LIMITS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
SHAPES = [(1, 1), (37, 65), (576, 192), (130, 1030), (4096, 4096), (1000, 14336)]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
def test_kernel_against_float64(dtype: torch.dtype, shape: tuple[int, int], rows: int, sparsity: float) -> None:
    n_out, n_in = shape
    generator = torch.Generator("cuda").manual_seed(rows)
    x = torch.randn(rows, 1, n_in, generator=generator, device="cuda").to(dtype)
    weight = input_major(torch.randn(n_out, n_in, generator=generator, device="cuda").to(dtype))
    bias = torch.randn(n_out, generator=generator, device="cuda").to(dtype)
    cut = x.abs().float().quantile(sparsity) if sparsity else torch.tensor(-1.0, device="cuda")
    expected = reference_linear(x.double(), weight.double(), bias.double(), cut.double())
    y = sparse_linear(x, weight, bias, cut, "triton")
    assert float((y.double() - expected).norm() / expected.norm()) < LIMITS[dtype]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_same_bits_on_100_runs(dtype: torch.dtype) -> None:
    x = torch.randn(1, 1, 4096, device="cuda").to(dtype)
    weight = input_major(torch.randn(4096, 4096, device="cuda").to(dtype))
    cut = torch.tensor(0.67, device="cuda")
    first = sparse_linear(x, weight, None, cut, "triton")
    for _ in range(100):
        assert torch.equal(sparse_linear(x, weight, None, cut, "triton"), first)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_inputs_propagate(value: float) -> None:
    x = torch.randn(1, 1, 65, device="cuda")
    x[0, 0, 7] = value
    weight, cut = torch.randn(37, 65, device="cuda"), torch.tensor(0.5, device="cuda")
    y = sparse_linear(x, input_major(weight), None, cut, "triton")
    dense = torch.nn.functional.linear(masked_input(x, cut), weight)
    assert torch.equal(y.isnan(), dense.isnan())
    assert torch.equal(y.isinf(), dense.isinf())


def test_auto_takes_triton() -> None:
    assert resolve_backend("auto", "cuda", torch.bfloat16) == "triton"
    with pytest.raises(RuntimeError, match="CPU tensors"):
        resolve_backend("cpu", "cuda", torch.bfloat16)
