"""Gate-first products against float64, over kinds, shapes, dtypes, numbers of tokens and shares of dead neurons."""

import pytest
import torch
import torch.nn.functional as F
from covering import covering
from torch import Tensor

from teal_kernels.gate_first import GateActivation, gate_first, gated_hidden, rounded_threshold
from teal_kernels.triton_gate_first import GateFirstConfig, GateLayer, triton_gate_first

BACKENDS = ["reference", "cpu", "triton"]
ACTIVATIONS = [
    GateActivation("relu"),
    GateActivation("fatrelu", 0.3),
    GateActivation("relu2"),
    GateActivation("drelu"),
]
# Relative norm error: float32 sums, and for 16 bits three roundings, of up, of the activation and of the product;
# (1, 1) is a single number, and the interpreter cuts bfloat16 off where a GPU rounds it.
LIMITS = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 2e-2}
SHAPES = [(1, 1), (37, 65), (130, 200)]
"""(out, in): no size is a multiple of a block."""


def _case(
    shape: tuple[int, int], rows: int, dtype: torch.dtype, dead: float = 0.5, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, gate, weight and bias; that share of each token's gates is well below zero."""
    n_out, n_in = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 1, n_in, generator=generator).to(dtype)
    weight = torch.randn(n_out, n_in, generator=generator).to(dtype)
    bias = torch.randn(n_out, generator=generator).to(dtype)
    size = torch.rand(rows, 1, n_out, generator=generator) + 0.5
    sign = torch.rand(rows, 1, n_out, generator=generator) >= dead
    return x, torch.where(sign, size, -size).to(dtype), weight, bias


def _expected(x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor | None, activation: GateActivation) -> Tensor:
    """Written out in float64, independently of the code under test."""
    up = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    gate = gate.double()
    threshold = float(torch.tensor(activation.threshold, dtype=x.dtype))
    return {
        "relu": gate.clamp_min(0) * up,
        "fatrelu": torch.where(gate >= threshold, gate, 0.0) * up,
        "relu2": gate.clamp_min(0) ** 2 * up,
        "drelu": gate.clamp_min(0) * up.clamp_min(0),
    }[activation.kind]


def _check(y: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert (y.dtype, y.shape) == (dtype, expected.shape)
    assert float((y.double() - expected).norm()) <= LIMITS[dtype] * float(expected.norm())
    # Exactly zero where the definition is, and nowhere else but where a product of rounded sums may be.
    assert bool((y[expected == 0] == 0).all())


@covering(backend=BACKENDS, activation=ACTIVATIONS, dtype=list(LIMITS), shape=SHAPES)
def test_against_float64(backend: str, activation: GateActivation, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, gate, weight, bias = _case(shape, 1, dtype)
    y = gate_first(x, gate, weight, bias, activation, backend)
    _check(y, _expected(x, gate, weight, bias, activation), dtype)


@covering(backend=BACKENDS, rows=[2, 3, 8, 11], dead=[0.0, 0.6, 0.9, 1.0], dtype=[torch.float32, torch.bfloat16])
def test_several_tokens_each_with_its_own_dead(backend: str, rows: int, dead: float, dtype: torch.dtype) -> None:
    activation = ACTIVATIONS[rows % 4]
    x, gate, weight, _ = _case((37, 65), rows, dtype, dead)
    y = gate_first(x, gate, weight, None, activation, backend)
    _check(y, _expected(x, gate, weight, None, activation), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.kind)
@pytest.mark.parametrize("dead", [0.0, 1.0])
def test_all_dead_and_all_live(backend: str, activation: GateActivation, dead: float) -> None:
    x, gate, weight, bias = _case((130, 65), 1, torch.float32, dead)
    y = gate_first(x, gate, weight, bias, activation, backend)
    _check(y, _expected(x, gate, weight, bias, activation), torch.float32)
    assert bool((y == 0).all()) == (dead == 1.0)


CONFIGS = [
    GateFirstConfig(neurons=4, block_out=1, block_in=64, unroll=1, warps=1),
    GateFirstConfig(neurons=16, block_out=8, block_in=64, unroll=2, warps=1, evict_first=False),
    GateFirstConfig(neurons=64, block_out=2, block_in=128, unroll=4, warps=1),
    GateFirstConfig(neurons=8, block_out=16, block_in=256, unroll=1, warps=1),  # more places than neurons
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_every_cut_gives_the_same(config: GateFirstConfig, rows: int) -> None:
    x, gate, weight, bias = _case((77, 300), rows, torch.float32, 0.7)
    y = triton_gate_first(x, gate, weight, bias, kind="relu", threshold=0.0, config=config)
    _check(y, _expected(x, gate, weight, bias, ACTIVATIONS[0]), torch.float32)


FUSED_CUTS = [
    GateFirstConfig(neurons=8, block_out=2, block_in=64, unroll=1, warps=1, gate_block_in=64, gate_unroll=1),
    GateFirstConfig(neurons=4, block_out=4, block_in=128, unroll=2, warps=1, gate_block_in=128, gate_unroll=4),
    GateFirstConfig(neurons=16, block_out=1, block_in=256, unroll=1, warps=1, gate_block_in=64, gate_unroll=2),
]


def _gate_layer(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    n_out, n_in = shape
    generator = torch.Generator().manual_seed(9)
    weight = torch.randn(n_out, n_in, generator=generator) / n_in**0.5
    return weight.to(dtype), torch.randn(n_out, generator=generator).to(dtype) * 0.1


@covering(backend=BACKENDS, activation=ACTIVATIONS, dtype=list(LIMITS), rows=[1, 3, 9], biased=[False, True])
def test_with_the_gate_product_computed_on_the_way(
    backend: str, activation: GateActivation, dtype: torch.dtype, rows: int, biased: bool
) -> None:
    x, _, weight, bias = _case((37, 65), rows, dtype)
    gate_weight, gate_bias = _gate_layer((37, 65), dtype)
    y = gated_hidden(
        x, gate_weight, gate_bias if biased else None, weight, bias if biased else None, activation, backend
    )
    exact = F.linear(x.double(), gate_weight.double(), gate_bias.double() if biased else None)
    expected = _expected(x, exact, weight, bias if biased else None, activation)
    # fatrelu has a step at its threshold: there a rounding of the gate decides.
    undecided = (exact - activation.threshold).abs() < 8 * torch.finfo(dtype).eps
    if activation.kind == "fatrelu":
        y, expected = y[~undecided], expected[~undecided]
    assert y.dtype == dtype
    assert float((y.double() - expected).norm() / expected.norm()) < 1.5 * LIMITS[dtype]


@pytest.mark.parametrize("config", FUSED_CUTS, ids=str)
@pytest.mark.parametrize("rows", [1, 2])
def test_every_cut_gives_the_same_with_the_gate_on_the_way(config: GateFirstConfig, rows: int) -> None:
    x, _, weight, bias = _case((77, 300), rows, torch.float32)
    gate_weight, gate_bias = _gate_layer((77, 300), torch.float32)
    layer = GateLayer(gate_weight, gate_bias)
    y = triton_gate_first(x, layer, weight, bias, kind="relu2", threshold=0.0, config=config)
    exact = F.linear(x.double(), gate_weight.double(), gate_bias.double())
    expected = _expected(x, exact, weight, bias, ACTIVATIONS[2])
    assert float((y.double() - expected).norm() / expected.norm()) < LIMITS[torch.float32]


def test_rows_of_dead_neurons_are_not_read() -> None:
    """A NaN in their weights would show."""
    for backend in ("cpu", "triton"):
        x, gate, weight, bias = _case((37, 65), 2, torch.float32, 0.8)
        dead = (gate <= 0).all(0).view(-1)
        assert bool(dead.any())
        weight[dead] = torch.nan
        y = gate_first(x, gate, weight, bias, ACTIVATIONS[0], backend)
        assert bool(y.isfinite().all()), backend


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.kind)
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_not_finite_shows_where_it_is_live(backend: str, activation: GateActivation, rows: int) -> None:
    x, gate, weight, bias = _case((37, 65), rows, torch.float32, 0.4)
    gate[0, 0, 5], gate[0, 0, 6] = torch.nan, torch.inf
    gate[0, 0, 7] = -1.0  # dead for this token
    gate[-1, 0, 7] = 1.0 if rows == 2 else -1.0
    weight[7] = torch.inf
    y = gate_first(x, gate, weight, bias, activation, backend)
    assert bool(y[0, 0, 5].isnan())
    assert float(y[0, 0, 7]) == 0.0
    assert bool(y[0, 0, 6].isinf()) or activation.kind == "drelu"
    finite = torch.ones_like(y, dtype=torch.bool)
    finite[0, 0, 5] = finite[0, 0, 6] = finite[-1, 0, 7] = False
    assert bool(y[finite].isfinite().all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_fatrelu_keeps_what_equals_its_threshold(backend: str, dtype: torch.dtype) -> None:
    """The threshold is a value of the dtype: 0.01 is none, and rounds."""
    threshold = rounded_threshold(0.01, dtype)
    below = torch.nextafter(torch.tensor(threshold, dtype=dtype), torch.tensor(0.0, dtype=dtype))
    gate = torch.tensor([[threshold, float(below), 0.0, 1.0]], dtype=dtype)
    y = gate_first(
        torch.ones(1, 1, dtype=dtype),
        gate,
        torch.ones(4, 1, dtype=dtype),
        None,
        GateActivation("fatrelu", 0.01),
        backend,
    )
    assert y.tolist() == [[threshold, 0.0, 0.0, 1.0]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_every_time(backend: str) -> None:
    x, gate, weight, bias = _case((130, 200), 3, torch.bfloat16, 0.7)
    first = gate_first(x, gate, weight, bias, ACTIVATIONS[1], backend)
    for _ in range(5):
        assert torch.equal(gate_first(x, gate, weight, bias, ACTIVATIONS[1], backend), first)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_an_input_major_weight_is_slow_but_right(backend: str) -> None:
    x, gate, weight, _ = _case((37, 65), 1, torch.float32)
    y = gate_first(x, gate, weight.t().contiguous().t(), None, ACTIVATIONS[0], backend)
    _check(y, _expected(x, gate, weight, None, ACTIVATIONS[0]), torch.float32)


def test_they_are_operators_that_can_be_traced() -> None:
    x, gate, weight, bias = _case((37, 65), 1, torch.float32)
    torch.library.opcheck(torch.ops.teal.gate_first.default, (x, gate, weight, bias, "fatrelu", 0.3, "cpu"))
    layer = _gate_layer((37, 65), torch.float32)
    torch.library.opcheck(torch.ops.teal.gated_hidden.default, (x, *layer, weight, bias, "relu", 0.0, "cpu"))
