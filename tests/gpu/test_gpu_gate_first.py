"""Gate first on a real GPU: against float64, the same bits on every run, and inside the graph of a token."""

from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY
from intrinsic_models import save_kind
from torch import Tensor
from torch.nn.functional import linear

from teal_cli.decode.engine import Engine
from teal_cli.decode.loop import TokenLoop
from teal_cli.decode.sampling import Sampler, SamplingConfig
from teal_cli.model_loading import load_model
from teal_cli.sparse import control_of, make_intrinsic_, neuron_sparsity, use_backend
from teal_kernels.gate_first import GateActivation, gate_first, gated_hidden
from teal_kernels.triton_gate_first import GateFirstConfig, triton_gate_first

# Relative norm error: float32 sums, and for 16 bits the roundings of up, of the activation and of the product.
LIMITS = {torch.float32: 3e-6, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}
SHAPES = [(11008, 4096), (14336, 4096), (1536, 576), (130, 200), (37, 65), (1, 1)]
ACTIVATIONS = [
    GateActivation("relu"),
    GateActivation("fatrelu", 0.01),
    GateActivation("relu2"),
    GateActivation("drelu"),
]


def _case(shape: tuple[int, int], rows: int, dtype: torch.dtype, dead: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n_out, n_in = shape
    generator = torch.Generator("cuda").manual_seed(rows)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device="cuda")

    size = random(rows, 1, n_out).abs() + 0.1
    live = torch.rand(rows, 1, n_out, generator=generator, device="cuda") >= dead
    gate = torch.where(live, size, -size).to(dtype)
    return random(rows, 1, n_in).to(dtype), gate, random(n_out, n_in).to(dtype), random(n_out).to(dtype)


def _expected(x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, activation: GateActivation) -> Tensor:
    up = linear(x.double(), weight.double(), bias.double())
    live = gate.double().clamp_min(0)  # none lies between 0 and the threshold of fatrelu
    if activation.kind == "drelu":
        return live * up.clamp_min(0)
    return (live * live if activation.kind == "relu2" else live) * up


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 8, 9])
@pytest.mark.parametrize("dead", [0.0, 0.5, 0.9, 1.0])
def test_against_float64(dtype: torch.dtype, shape: tuple[int, int], rows: int, dead: float) -> None:
    case = _case(shape, rows, dtype, dead)
    for activation in ACTIVATIONS:
        expected = _expected(*case, activation)
        y = gate_first(*case, activation, "triton")
        assert float((y.double() - expected).norm()) <= LIMITS[dtype] * float(expected.norm())
        assert bool((y[expected == 0] == 0).all())


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 8, 9])
@pytest.mark.parametrize("bias", [0.0, -1.0])
def test_with_the_gate_product_in_the_same_launch(
    dtype: torch.dtype, shape: tuple[int, int], rows: int, bias: float
) -> None:
    """Activations without a step, at which the rounding of a gate would decide; two fifths or four fifths dead."""
    x, _, weight, up_bias = _case(shape, rows, dtype, 0.0)
    gate_weight = (torch.randn(*shape, device="cuda") / shape[1] ** 0.5).to(dtype)
    gate_bias = torch.full((shape[0],), bias, device="cuda", dtype=dtype)
    gate = linear(x.double(), gate_weight.double(), gate_bias.double())
    for activation in (ACTIVATIONS[0], ACTIVATIONS[2], ACTIVATIONS[3]):
        arguments = (x, gate_weight, gate_bias, weight, up_bias, activation, "triton")
        y = gated_hidden(*arguments)
        expected = _expected(x, gate, weight, up_bias, activation)
        assert float((y.double() - expected).norm()) <= 2 * LIMITS[dtype] * float(expected.norm())
        assert torch.equal(y, gated_hidden(*arguments))


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("neurons", [8, 64])
@pytest.mark.parametrize("block_out", [1, 8])
@pytest.mark.parametrize("warps", [1, 4, 8])
def test_every_cut(rows: int, neurons: int, block_out: int, warps: int) -> None:
    x, gate, weight, bias = _case((1536, 576), rows, torch.bfloat16, 0.8)
    config = GateFirstConfig(neurons=neurons, block_out=block_out, block_in=512, unroll=2, warps=warps)
    y = triton_gate_first(x, gate, weight, bias, kind="relu", threshold=0.0, config=config)
    expected = _expected(x, gate, weight, bias, ACTIVATIONS[0])
    assert float((y.double() - expected).norm() / expected.norm()) < LIMITS[torch.bfloat16]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("rows", [1, 8])
def test_same_bits_on_100_runs(dtype: torch.dtype, rows: int) -> None:
    case = _case((11008, 4096), rows, dtype, 0.9)
    first = gate_first(*case, ACTIVATIONS[0], "triton")
    for _ in range(100):
        assert torch.equal(gate_first(*case, ACTIVATIONS[0], "triton"), first)


def test_rows_of_dead_neurons_are_not_read() -> None:
    x, gate, weight, bias = _case((11008, 4096), 2, torch.bfloat16, 0.9)
    weight[(gate <= 0).all(0).view(-1)] = torch.nan
    assert bool(gate_first(x, gate, weight, bias, ACTIVATIONS[0], "triton").isfinite().all())


@torch.no_grad()
@pytest.mark.parametrize("path", ["fused", "general"])
@pytest.mark.parametrize("kind", ["relu", "relu2", "sparsellama", "bamboo"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_model_decodes_as_dense_inside_a_graph(tmp_path: Path, kind: str, rows: int, path: str) -> None:
    """Greedy tokens, of replays and of counted steps, are those of the dense model."""
    model = load_model(save_kind(tmp_path / kind, kind), device="cuda", dtype="float32")
    make_intrinsic_(model)
    control = control_of(model)
    assert use_backend(control, "auto", model.device, model.dtype) == "triton"
    assert Engine(model).path.name == "fused"
    engine = Engine(model, path=path)
    ids = torch.randint(2, VOCABULARY, (rows, 12), generator=torch.Generator().manual_seed(0)).cuda()
    greedy = SamplingConfig()

    def decoded() -> list[list[int]]:
        cache = engine.new_cache(48)
        sampler = Sampler(greedy, engine.device)
        loop = TokenLoop(engine, cache, sampler.next_token(engine.prefill(ids, cache)), sampler)
        tokens = [loop.advance().view(-1).tolist() for _ in range(32)]
        assert loop.captures != (path == "general" and _slides(cache.state))
        return tokens

    with control.switched_off():
        expected = decoded()
    assert decoded() == expected
    with control.counting() as counter:
        assert decoded() == expected
    dead = neuron_sparsity(model, counter.by_projection())
    assert dead is not None
    assert 0.3 < dead < 0.9


def _slides(cache: object) -> bool:
    """A sliding cache moves by rules in Python, which no graph holds."""
    return any(getattr(cache, "is_sliding", ()))
