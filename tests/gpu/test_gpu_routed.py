"""Routed MLPs on a real GPU: the launches behind others, and whole sessions."""

import pytest
import torch
from gpu_sessions import decoded
from routed_models import routed
from torch import Tensor
from torch.nn.functional import linear, silu

from teal_cli.sparse import lay_out_
from teal_kernels import KEEP_ALL
from teal_kernels.launching import hopper_or_later
from teal_kernels.operands import Norm, Scratch
from teal_kernels.triton_gate_first import GateLayer
from teal_kernels.triton_gemv import TileConfig, gemv, squares_of
from teal_kernels.triton_routed import GroupRouter, RoutedConfig, launch_routed, no_choice, route_groups, routed_config

# Relative norm error, as for gate first: float32 sums, and for 16 bits the roundings of x, gate, up and product.
LIMITS = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
SHAPES = [(11008, 4096, 32), (14336, 4096, 32), (1536, 576, 32), (11008, 4096, 1), (120, 200, 6)]
"""Neurons, inputs, neurons of a group."""
CONFIGS = {
    "two": RoutedConfig(neurons=2, block_in=1024, unroll=4, warps=4),
    "loops": RoutedConfig(neurons=4, block_in=512, unroll=2, warps=4),
    "one warp": RoutedConfig(neurons=16, block_in=64, unroll=1, warps=1),
    "tensor cores": routed_config(4096, 4, 32),
}
EPS = 1e-5
GPU = torch.device("cuda", 0)


class Behind:
    """A residual product, and a routed MLP behind it, which reads what that one leaves: x and its squares."""

    def __init__(self, shape: tuple[int, int, int], rows: int, dtype: torch.dtype, rank: int | None = None) -> None:
        self.n_out, self.n_in, group = shape
        generator = torch.Generator("cuda").manual_seed(rows)

        def random(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device="cuda").to(dtype)

        self.before, self.start, self.table = random(rows, 256), random(rows, self.n_in), random(256, self.n_in)
        self.gate, self.up = (random(self.n_out, self.n_in) / self.n_in**0.5 for _ in range(2))
        groups, inputs = self.n_out // group, rank or self.n_in
        first = None if rank is None else random(rank, self.n_in) / self.n_in**0.5
        self.router = GroupRouter(first, random(groups, inputs) / inputs**0.5, random(groups) / 4, group)
        self.chosen, self.ranked = no_choice(rows, self.router, GPU, dtype)
        self.weight = 1 + random(self.n_in) / 8
        self.config = TileConfig(block_out=128, block_in=4, unroll=4, inputs_per_chunk=128, warps=1)
        columns = squares_of(self.table, (self.n_in,), self.config, rows, dtype)
        self.squares = torch.zeros(rows, columns, device="cuda")
        self.scratch, self.keep_all = Scratch(GPU), torch.full((1,), KEEP_ALL, device="cuda")
        self.x, self.hidden = torch.empty_like(self.start), random(rows, self.n_out)
        self.kept = torch.zeros(1, dtype=torch.int64, device="cuda")

    def run(self, whole: bool = False, config: RoutedConfig | None = None) -> Tensor:
        """What down would read; the launches overlap where the GPU can."""
        pdl = hopper_or_later(GPU)
        self.x.copy_(self.start)
        self.kept.zero_()
        gemv(
            self.before,
            self.table,
            (self.n_in,),
            self.keep_all,
            self.x,
            self.config,
            self.scratch,
            epilogue="residual",
            squares=self.squares,
            pdl=pdl,
        )
        norm = Norm(self.weight, EPS, self.squares)
        route_groups(self.x, self.router, self.chosen, self.ranked, norm=norm, counts=self.kept, pdl=pdl)
        launch_routed(
            self.x,
            self.chosen,
            GateLayer(self.gate, None),
            GateLayer(self.up, None),
            self.hidden,
            group=self.router.group,
            kind="silu",
            norm=norm,
            whole=whole,
            config=config,
            pdl=pdl,
        )
        return self.hidden.clone()

    def expected(self) -> tuple[Tensor, Tensor]:
        """Logits and hidden state in float64, from the x that was written and the groups that were chosen."""
        x, router = self.x.double(), self.router
        seen = x * torch.rsqrt(x.square().mean(1, keepdim=True) + EPS) * self.weight.double()
        ranked = seen if router.first is None else linear(seen, router.first.double()).clamp_min(0)
        logits = linear(ranked, router.weight.double(), router.bias.double())
        hidden = silu(linear(seen, self.gate.double())) * linear(seen, self.up.double())
        return logits, hidden * self.chosen.repeat_interleave(router.group, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 4, 8])
@pytest.mark.parametrize("rank", [None, 100])
def test_behind_the_launch_that_writes_its_inputs(
    dtype: torch.dtype, shape: tuple[int, int, int], rows: int, rank: int | None
) -> None:
    case = Behind(shape, rows, dtype, rank)
    for whole in (False, True):
        hidden = case.run(whole)
        logits, expected = case.expected()
        assert float((hidden.double() - expected).norm()) <= LIMITS[dtype] * float(expected.norm())
        sure = logits.abs() > 64 * torch.finfo(dtype).eps
        assert torch.equal(case.chosen.bool()[sure], (logits > 0)[sure])
        assert int(case.kept) == int(case.chosen.sum()) * case.router.group
        assert all(torch.equal(case.run(whole), hidden) for _ in range(20))


@torch.no_grad()
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("whole", [False, True])
def test_every_cut(config: str, rows: int, whole: bool) -> None:
    case = Behind((11008, 4096, 32), rows, torch.bfloat16)
    hidden = case.run(whole, CONFIGS[config])
    _, expected = case.expected()
    assert float((hidden.double() - expected).norm()) <= LIMITS[torch.bfloat16] * float(expected.norm())


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 4])
def test_rows_of_groups_that_are_left_out_are_not_read(rows: int) -> None:
    case = Behind((11008, 4096, 32), rows, torch.bfloat16)
    expected = case.run()
    left_out = (~case.chosen.bool().any(0)).repeat_interleave(32)
    assert bool(left_out.any())
    case.gate[left_out] = case.up[left_out] = torch.nan
    assert torch.equal(case.run(), expected)


@torch.no_grad()
@pytest.mark.usefixtures("skipping")
@pytest.mark.parametrize("rows", [1, 2, 4, 8])
@pytest.mark.parametrize(("group", "rank"), [(4, None), (20, None), (1, 12)])
def test_sessions_against_the_reference(group: int, rank: int | None, rows: int) -> None:
    """In float32, where no logit of a group lies so near to zero that another order of its sum decides."""
    model = routed(group, rank).cuda()
    lay_out_(model)
    for dense in (False, True):
        expected, counted = decoded(model, rows, "general", dense)
        logits, realised = decoded(model, rows, "fused", dense)
        assert float((logits - expected).norm() / expected.norm()) < 1e-4
        assert realised == pytest.approx(counted, abs=1e-9)
        assert bool(realised) != dense
