"""The kernels of routed MLPs against float64: routers of one layer and of two, and what they choose of gate and up."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from covering import covering
from torch import Tensor

from teal_kernels.operands import Norm
from teal_kernels.triton_gate_first import GateLayer
from teal_kernels.triton_routed import GroupRouter, RoutedConfig, launch_routed, no_choice, route_groups

# As in test_gate_first_step.
LIMITS = {torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 4e-2}
KINDS = ["silu", "gelu", "gelu_tanh", "relu", "relu2", "fatrelu", "drelu"]
THRESHOLD = 0.25
SHAPES = [(1, 37, 65), (6, 8, 65), (32, 2, 256), (16, 4, 100)]
"""Neurons of a group, groups, inputs."""
CONFIGS = {
    "at once": RoutedConfig(neurons=2, block_in=1024, unroll=4, warps=1),
    "loops": RoutedConfig(neurons=8, block_in=64, unroll=2, warps=1),
    "tensor cores": RoutedConfig(neurons=32, block_in=64, unroll=1, warps=1),
}
EPS = 1e-5


@dataclass
class Case:
    """Arguments of the launches, and what they are to give."""

    x: Tensor
    norm: Norm | None
    router: GroupRouter
    gate: GateLayer
    up: GateLayer
    kind: str

    @classmethod
    def random(
        cls,
        shape: tuple[int, int, int],
        rows: int,
        dtype: torch.dtype = torch.float32,
        kind: str = "silu",
        norm: str = "none",
        rank: int | None = None,
        biased: bool = False,
    ) -> "Case":
        group, groups, n_in = shape
        generator = torch.Generator().manual_seed(rows + n_in)

        def random(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(dtype)

        n_out = group * groups
        x = random(rows, n_in) * (1.0 if norm == "none" else 3.0)
        squares = torch.stack([part.float().square().sum(1) for part in x.split(24, dim=1)], dim=1)
        first = None if rank is None else random(rank, n_in) / n_in**0.5
        return cls(
            x,
            None if norm == "none" else Norm(random(n_in) / 8 + (norm != "plus one"), EPS, squares, norm == "plus one"),
            GroupRouter(first, random(groups, rank or n_in) / (rank or n_in) ** 0.5, random(groups) / 4, group),
            GateLayer(random(n_out, n_in) / n_in**0.5, random(n_out) if biased else None),
            GateLayer(random(n_out, n_in), random(n_out) if biased else None),
            kind,
        )

    @property
    def seen(self) -> Tensor:
        """What all layers read, rounded as transformers rounds."""
        if self.norm is None:
            return self.x
        x = self.x.float()
        scaled = x * torch.rsqrt(x.square().mean(1, keepdim=True) + EPS)
        if self.norm.plus_one:
            return (scaled * (1 + self.norm.weight.float())).to(self.x.dtype)
        return scaled.to(self.x.dtype) * self.norm.weight

    def logits(self) -> Tensor:
        """In float64, but for what two layers leave between them."""
        seen, router = self.seen, self.router
        if router.first is not None:
            seen = F.linear(seen.double(), router.first.double()).clamp_min(0).to(self.x.dtype)
        return F.linear(seen.double(), router.weight.double(), router.bias.double())

    def expected(self, chosen: Tensor) -> Tensor:
        gate, up = (
            F.linear(self.seen.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
            for layer in (self.gate, self.up)
        )
        active = {
            "silu": F.silu(gate),
            "gelu": F.gelu(gate),
            "gelu_tanh": F.gelu(gate, approximate="tanh"),
            "relu2": gate.clamp_min(0) ** 2,
            "fatrelu": torch.where(gate >= THRESHOLD, gate, 0.0),
        }.get(self.kind, gate.clamp_min(0))
        hidden = active * (up.clamp_min(0) if self.kind == "drelu" else up)
        return hidden * chosen.repeat_interleave(self.router.group, dim=1)

    def choose(self, counts: Tensor | None = None) -> Tensor:
        chosen, ranked = no_choice(self.x.shape[0], self.router, self.x.device, self.x.dtype)
        chosen.fill_(7)
        route_groups(self.x, self.router, chosen, ranked, norm=self.norm, counts=counts)
        return chosen

    def hidden(self, chosen: Tensor, config: str | None = None, whole: bool = False) -> Tensor:
        hidden = self.x.new_full((self.x.shape[0], self.gate.weight.shape[0]), torch.nan)
        launch_routed(
            self.x,
            chosen,
            self.gate,
            self.up,
            hidden,
            group=self.router.group,
            kind=self.kind,
            threshold=THRESHOLD,
            norm=self.norm,
            whole=whole,
            config=None if config is None else CONFIGS[config],
        )
        return hidden


@covering(
    shape=SHAPES,
    rows=[1, 2, 4],
    dtype=list(LIMITS),
    norm=["rms", "plus one", "none"],
    rank=[None, 24],
)
def test_what_routers_choose(
    shape: tuple[int, int, int], rows: int, dtype: torch.dtype, norm: str, rank: int | None
) -> None:
    case = Case.random(shape, rows, dtype, norm=norm, rank=rank)
    counts = torch.full((1,), 1000)
    chosen, logits = case.choose(counts), case.logits()
    sure = logits.abs() > 16 * torch.finfo(dtype).eps
    assert torch.equal(chosen.bool()[sure], (logits > 0)[sure])
    assert set(chosen.unique().tolist()) <= {0, 1}
    assert int(counts) == 1000 + int(chosen.sum()) * shape[0]
    assert int(sure.sum()) > 0.5 * sure.numel()


@covering(
    config=[*CONFIGS, None],
    kind=KINDS,
    shape=SHAPES,
    rows=[1, 2, 4],
    dtype=list(LIMITS),
    whole=[False, True],
    norm=["rms", "plus one", "none"],
    biased=[False, True],
)
def test_hidden_against_float64(
    config: str | None,
    kind: str,
    shape: tuple[int, int, int],
    rows: int,
    dtype: torch.dtype,
    whole: bool,
    norm: str,
    biased: bool,
) -> None:
    case = Case.random(shape, rows, dtype, kind, norm, biased=biased)
    chosen = (torch.rand(rows, shape[1], generator=torch.Generator().manual_seed(rows)) < 0.5).int()
    chosen[0, 0] = 1
    hidden, expected = case.hidden(chosen, config, whole), case.expected(chosen)
    assert hidden.dtype == dtype
    assert float((hidden.double() - expected).norm()) <= LIMITS[dtype] * float(expected.norm())
    assert not bool(hidden[expected == 0].any())


@pytest.mark.parametrize("config", CONFIGS)
def test_rows_of_groups_that_no_row_chose_are_not_read(config: str) -> None:
    """A NaN in their weights would show where all are computed, and meets no chosen one."""
    case = Case.random((16, 4, 100), 2)
    chosen = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 1]], dtype=torch.int32)
    expected = case.hidden(chosen, config)
    for layer in (case.gate, case.up):
        layer.weight[16:48] = torch.nan
    for whole in (False, True):
        assert float((case.hidden(chosen, config, whole) - expected).norm() / expected.norm()) < LIMITS[torch.float32]


def test_a_nan_is_chosen() -> None:
    case = Case.random((6, 8, 65), 2, rank=24)
    case.x[1, 3] = torch.nan
    chosen = case.choose()
    assert chosen[1].tolist() == [1] * 8
    assert 0 < int(chosen[0].sum()) < 8


def test_what_the_launches_do_not_take() -> None:
    case = Case.random((6, 8, 65), 9)
    with pytest.raises(ValueError, match="9 rows are more than the 8"):
        case.choose()
    case = Case.random((6, 8, 65), 1)
    chosen = case.choose()
    with pytest.raises(ValueError, match="9 groups of 6 are not 48 neurons"):
        case.hidden(F.pad(chosen, (0, 1)))
    with pytest.raises(ValueError, match="two layers"):
        route_groups(case.x, case.router, chosen, case.x)
