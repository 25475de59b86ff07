"""On a real GPU: the Triton kernel against float64, repeatability, and a whole sparse model."""

import os
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, export_tiny, save_tiny

from teal_cli.cli import run
from teal_cli.decode.engine import Engine
from teal_cli.decode.sampling import SamplingConfig
from teal_cli.models.loading import load_model
from teal_cli.sparse import control_of, sparse_layers
from teal_kernels import input_major, masked_input, reference_linear, resolve_backend, sparse_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is on: use make test-gpu"),
]
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_engine_against_the_reference_backend(tmp_path: Path, family: str, dtype: str) -> None:
    out, _ = export_tiny(save_tiny(tmp_path / "dense", family), tmp_path / "sparse")
    model = load_model(out, device="cuda", dtype=dtype)
    assert all(layer.weight.is_cuda and layer.threshold.is_cuda for layer in sparse_layers(model).values())
    control = control_of(model)
    torch.manual_seed(0)
    prompt = torch.randint(2, VOCABULARY, (1, 20))
    logits = {}
    with torch.no_grad():
        for backend in ("reference", "triton"):
            control.backend = backend
            engine = Engine(model)  # takes the backend's path
            assert (engine.decoder is not None) == (backend == "triton")
            cache = engine.new_cache(40)
            engine.prefill(prompt.cuda(), cache)
            logits[backend] = torch.stack([engine.step(prompt[:, i : i + 1].cuda(), cache) for i in range(20)]).double()
    error = (logits["triton"] - logits["reference"]).norm() / logits["reference"].norm()
    assert float(error) < (1e-4 if dtype == "float32" else 0.05)
    control.backend = "triton"
    with control.counting() as counter:
        assert len(list(engine.generate(prompt, max_new_tokens=16, sampling=SamplingConfig(temperature=1.0)))) == 16
    assert counter.model_wide() == pytest.approx(0.5, abs=0.15)


def test_bench_with_random_weights(tmp_path: Path) -> None:
    arguments = ["bench", "--model", "llama-3.2-1b", "--random-weights", "--sparsity", "0.5", "--new-tokens", "8"]
    assert run([*arguments, "--repeats", "2", "--kernels", "--json", "b.json"]) == 0
