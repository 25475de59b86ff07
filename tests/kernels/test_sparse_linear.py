"""Every backend against the definition in float64, over dtypes, odd widths, sparsities and batches."""

import subprocess
import sys

import pytest
import torch
from covering import covering
from torch.nn.functional import linear

from teal_kernels import (
    BackendUnavailableError,
    active_inputs,
    backend_unavailable_reason,
    input_major,
    is_input_major,
    masked_input,
    reference_linear,
    resolve_backend,
    sparse_linear,
)

BACKENDS = ["reference", "cpu", "triton"]
# Relative norm error: float32 sums of a thousand terms, and the rounding of the 16-bit result.
LIMITS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
SHAPES = [(1, 1), (37, 65), (576, 192), (130, 1030), (64, 64)]


def _case(shape: tuple[int, int], rows: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, ...]:
    n_out, n_in = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 1, n_in, generator=generator).to(dtype)
    weight = input_major(torch.randn(n_out, n_in, generator=generator).to(dtype))
    bias = torch.randn(n_out, generator=generator).to(dtype)
    return x, weight, bias


def _error(y: torch.Tensor, reference: torch.Tensor) -> float:
    return float((y.double() - reference).norm() / reference.norm().clamp_min(1e-30))


@covering(backend=BACKENDS, dtype=list(LIMITS), shape=SHAPES, rows=[1, 3], sparsity=[0.0, 0.37, 0.9, 1.0])
def test_against_float64(backend: str, dtype: torch.dtype, shape: tuple[int, int], rows: int, sparsity: float) -> None:
    x, weight, bias = _case(shape, rows, dtype)
    cut = x.abs().float().quantile(sparsity) if sparsity else torch.tensor(-1.0)
    expected = reference_linear(x.double(), weight.double(), bias.double(), cut.double())
    y = sparse_linear(x, weight, bias, cut, backend)
    assert y.dtype == dtype
    assert y.shape == expected.shape
    assert _error(y, expected) < LIMITS[dtype]


@pytest.mark.parametrize("backend", BACKENDS)
def test_drops_exactly_the_inputs_at_or_below_the_threshold(backend: str) -> None:
    x = torch.tensor([[0.5, -0.5, 0.25, 0.75, -1.0]])
    y = sparse_linear(x, input_major(torch.eye(5)), None, torch.tensor(0.5), backend)
    assert y.tolist() == [[0.0, 0.0, 0.0, 0.75, -1.0]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_threshold_between_two_values_of_the_dtype(backend: str, dtype: torch.dtype) -> None:
    """Compared in float32: a threshold that would round up to a value must not drop it."""
    value = torch.tensor(1.0, dtype=dtype)
    below = torch.nextafter(value, torch.tensor(0.0, dtype=dtype)).float()
    threshold = (value.float() * 3 + below) / 4  # nearer to value: rounding would reach it
    y = sparse_linear(value.view(1, 1), torch.ones(1, 1, dtype=dtype), None, threshold, backend)
    assert float(y) == 1.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_not_finite_inputs_propagate_as_in_dense(backend: str, value: float) -> None:
    x, weight, _ = _case((37, 65), 1, torch.float32)
    x[0, 0, 7] = value
    threshold = torch.tensor(0.5)
    y = sparse_linear(x, weight, None, threshold, backend)
    dense = linear(masked_input(x, threshold), weight)
    assert torch.equal(y.isnan(), dense.isnan())
    assert torch.equal(y.isinf(), dense.isinf())
    assert torch.equal(y[y.isinf()], dense[dense.isinf()])
    assert not y.isfinite().any()


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_weights_of_dropped_inputs_are_not_used(backend: str) -> None:
    x, weight, _ = _case((37, 65), 1, torch.float32)
    threshold = torch.tensor(0.5)
    dropped = ~active_inputs(x, threshold)[0, 0]
    assert dropped.any()
    poisoned = weight.clone()
    poisoned[:, dropped] = float("nan")
    assert torch.equal(
        sparse_linear(x, input_major(poisoned), None, threshold, backend),
        sparse_linear(x, weight, None, threshold, backend),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_on_every_run(backend: str) -> None:
    x, weight, bias = _case((130, 1030), 2, torch.float32)
    first = sparse_linear(x, weight, bias, torch.tensor(0.6), backend)
    for _ in range(5):
        assert torch.equal(sparse_linear(x, weight, bias, torch.tensor(0.6), backend), first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_weight_layout_and_strided_inputs(backend: str) -> None:
    x, weight, bias = _case((37, 65), 2, torch.float32)
    wide = torch.randn(2, 1, 130)
    wide[..., ::2] = x
    expected = sparse_linear(x, weight, bias, torch.tensor(0.6), backend)
    got = sparse_linear(wide[..., ::2], weight.contiguous(), bias, torch.tensor(0.6), backend)
    torch.testing.assert_close(got, expected)


def test_input_major_layout() -> None:
    weight = torch.randn(3, 5)
    laid_out = input_major(weight)
    assert torch.equal(laid_out, weight)
    assert is_input_major(laid_out)
    assert not is_input_major(weight)
    assert input_major(laid_out).data_ptr() == laid_out.data_ptr()


def test_registered_op() -> None:
    """The op is usable by the compiler: schema, fake tensors and dispatch agree with the kernel."""
    x, weight, bias = _case((37, 65), 2, torch.float32)
    arguments = (x, weight, bias, torch.tensor(0.5), "cpu")
    torch.library.opcheck(
        torch.ops.teal.sparse_linear.default, arguments, test_utils=("test_schema", "test_faketensor")
    )
    assert torch.equal(torch.ops.teal.sparse_linear(*arguments), sparse_linear(*arguments))


def test_backend_by_name_runs_or_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, _ = _case((37, 65), 1, torch.float32)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendUnavailableError, match="needs a GPU"):
        sparse_linear(x, weight, None, torch.tensor(0.5), "triton")
    assert resolve_backend("auto", "cpu", torch.float32) == "cpu"
    with pytest.raises(ValueError, match="unknown backend 'cpuu'"):
        resolve_backend("cpuu", "cpu", torch.float32)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "float64" in str(backend_unavailable_reason("triton", "cpu", torch.float64))
    assert "CPU tensors" in str(backend_unavailable_reason("cpu", "cuda", torch.float32))


def test_imports_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, teal_kernels as k\n"
        "assert 'triton cannot be imported' in k.backend_unavailable_reason('triton', 'cpu', torch.float32)\n"
        "print(k.sparse_linear(torch.ones(1, 2), torch.ones(3, 2), None, torch.tensor(0.5)).sum())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "6." in result.stdout
