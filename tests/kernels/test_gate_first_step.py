"""Gate first as a step of a decoded token: a norm before it, live neurons counted, or every neuron computed."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from covering import covering
from torch import Tensor

from teal_kernels.gate_first import GateActivation
from teal_kernels.operands import Norm
from teal_kernels.triton_gate_first import GateFirstConfig, GateLayer, launch_gate_first

ACTIVATIONS = [
    GateActivation("relu"),
    GateActivation("fatrelu", 0.25),
    GateActivation("relu2"),
    GateActivation("drelu"),
]
# As in test_gate_first, where gates are computed on the way; after a norm x is rounded twice more.
LIMITS = {torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 4e-2}
SHAPES = [(37, 65), (64, 256)]
"""(out, in): no size is a multiple of a block, and both are."""
CONFIGS = {
    "at once": GateFirstConfig(neurons=2, block_out=1, block_in=1024, unroll=4, warps=1, gate_unroll=4),
    "loops": GateFirstConfig(neurons=8, block_out=4, block_in=64, unroll=1, warps=1, gate_block_in=64, gate_unroll=2),
    "late": GateFirstConfig(neurons=4, block_out=2, block_in=128, unroll=1, warps=1, gate_block_in=128, late=True),
    "tensor cores": GateFirstConfig(
        neurons=32, block_out=16, block_in=64, unroll=2, warps=1, gate_block_in=128, gate_unroll=1
    ),
}
EPS = 1e-5


@dataclass
class Step:
    """Arguments of a launch, and what it is to give."""

    x: Tensor
    norm: Norm | None
    gate: GateLayer
    up: Tensor
    up_bias: Tensor | None
    activation: GateActivation

    @classmethod
    def random(
        cls, shape: tuple[int, int], rows: int, dtype: torch.dtype, activation: GateActivation, norm: str, biased: bool
    ) -> "Step":
        n_out, n_in = shape
        generator = torch.Generator().manual_seed(rows + n_in)

        def random(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(dtype)

        x = random(rows, n_in) * (1.0 if norm == "none" else 3.0)
        squares = torch.stack([part.float().square().sum(1) for part in x.split(24, dim=1)], dim=1)
        weight = random(n_out, n_in) / n_in**0.5
        plus_one = norm == "plus one"
        return cls(
            x,
            None if norm == "none" else Norm(random(n_in) / 8 + (not plus_one), EPS, squares, plus_one),
            GateLayer(weight, random(n_out) - 0.5 if biased else None),
            random(n_out, n_in),
            random(n_out) if biased else None,
            activation,
        )

    @property
    def seen(self) -> Tensor:
        """What both products read, rounded as transformers rounds."""
        if self.norm is None:
            return self.x
        x = self.x.float()
        scaled = x * torch.rsqrt(x.square().mean(1, keepdim=True) + EPS)
        if self.norm.plus_one:
            return (scaled * (1 + self.norm.weight.float())).to(self.x.dtype)
        return scaled.to(self.x.dtype) * self.norm.weight

    @property
    def gates(self) -> Tensor:
        """In float64."""
        bias = None if self.gate.bias is None else self.gate.bias.double()
        return F.linear(self.seen.double(), self.gate.weight.double(), bias)

    def expected(self) -> Tensor:
        """Written out in float64, independently of the code under test."""
        up = F.linear(self.seen.double(), self.up.double(), None if self.up_bias is None else self.up_bias.double())
        gate = self.gates
        return {
            "relu": gate.clamp_min(0) * up,
            "fatrelu": torch.where(gate >= self.activation.threshold, gate, 0.0) * up,
            "relu2": gate.clamp_min(0) ** 2 * up,
            "drelu": gate.clamp_min(0) * up.clamp_min(0),
        }[self.activation.kind]

    @property
    def undecided(self) -> Tensor:
        """Gates so near to where neurons die that a rounding decides."""
        return (self.gates - self.activation.threshold).abs() < 8 * torch.finfo(self.x.dtype).eps

    def launch(self, config: GateFirstConfig, dense: bool = False, counts: Tensor | None = None) -> Tensor:
        hidden = self.x.new_full((self.x.shape[0], self.up.shape[0]), torch.nan)
        launch_gate_first(
            self.x,
            self.gate,
            self.up,
            self.up_bias,
            hidden,
            kind=self.activation.kind,
            threshold=self.activation.threshold,
            norm=self.norm,
            dense=dense,
            counts=counts,
            config=config,
        )
        return hidden


@covering(
    config=list(CONFIGS),
    activation=ACTIVATIONS,
    rows=[1, 2, 4],
    dtype=list(LIMITS),
    dense=[False, True],
    norm=["rms", "plus one", "none"],
    biased=[False, True],
    shape=SHAPES,
)
def test_against_float64(
    config: str,
    activation: GateActivation,
    rows: int,
    dtype: torch.dtype,
    dense: bool,
    norm: str,
    biased: bool,
    shape: tuple[int, int],
) -> None:
    step = Step.random(shape, rows, dtype, activation, norm, biased)
    counts = torch.full((1,), 1000)
    hidden = step.launch(CONFIGS[config], dense, counts)
    expected, sure = step.expected(), ~step.undecided
    assert hidden.dtype == dtype
    difference = (hidden.double() - expected)[sure]
    assert float(difference.norm()) <= LIMITS[dtype] * float(expected[sure].norm())
    assert bool((hidden[sure & (expected == 0)] == 0).all())
    live = int((step.gates >= step.activation.threshold).sum())
    counted = int(counts) - 1000
    assert abs(counted - (0 if dense else live)) <= int(step.undecided.sum())
    assert 0 < live < step.gates.numel()


@pytest.mark.parametrize("rows", [1, 4])
def test_counts_are_added_up_over_launches(rows: int) -> None:
    step = Step.random((37, 65), rows, torch.float32, ACTIVATIONS[0], norm="rms", biased=True)
    assert not bool(step.undecided.any())
    counts = torch.zeros(1, dtype=torch.int64)
    for _ in range(3):
        step.launch(CONFIGS["loops"], counts=counts)
    assert int(counts) == 3 * int((step.gates > 0).sum())


@pytest.mark.parametrize("config", CONFIGS)
def test_rows_of_dead_neurons_are_not_read(config: str) -> None:
    """A NaN in their weights would show; where every neuron is computed, it still meets no live one."""
    step = Step.random((64, 256), 2, torch.float32, ACTIVATIONS[0], norm="rms", biased=True)
    expected = step.launch(CONFIGS[config])
    dead = (step.gates <= 0).all(0)
    assert bool(dead.any())
    step.up[dead] = torch.nan
    for dense in (False, True):
        hidden = step.launch(CONFIGS[config], dense)
        assert float((hidden - expected).norm() / expected.norm()) < LIMITS[torch.float32]


@pytest.mark.parametrize("config", ["at once", "loops", "late"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.kind)
def test_dense_and_gate_first_give_the_same_gates(config: str, activation: GateActivation) -> None:
    """So a neuron that lives for one lives for the other."""
    step = Step.random((64, 256), 1, torch.bfloat16, activation, norm="rms", biased=True)
    sparse, dense = (step.launch(CONFIGS[config], dense) for dense in (False, True))
    assert torch.equal(sparse == 0, dense == 0)
    assert float((sparse - dense).float().norm() / dense.float().norm()) < LIMITS[torch.bfloat16]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dense", [False, True])
def test_same_bits_every_time(config: str, dense: bool) -> None:
    step = Step.random((37, 65), 4, torch.bfloat16, ACTIVATIONS[1], norm="rms", biased=False)
    first = step.launch(CONFIGS[config], dense)
    assert all(torch.equal(step.launch(CONFIGS[config], dense), first) for _ in range(3))


def test_what_one_launch_does_not_take() -> None:
    step = Step.random((37, 65), 9, torch.float32, ACTIVATIONS[0], norm="none", biased=False)
    with pytest.raises(ValueError, match="9 rows are more than the 8"):
        step.launch(CONFIGS["loops"])
    gates = torch.zeros(1, 37)
    with pytest.raises(ValueError, match="a dense launch computes the gates itself"):
        launch_gate_first(step.x[:1], gates, step.up, None, gates, kind="relu", threshold=0.0, dense=True)
