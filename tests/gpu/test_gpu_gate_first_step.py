"""Gate first as a step of a decoded token on a real GPU: the launch behind others, and whole sessions."""

from pathlib import Path

import pytest
import torch
from gpu_sessions import decoded
from intrinsic_models import KINDS, save_kind
from torch import Tensor
from torch.nn.functional import linear

from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.checkpoint.rules import Rule, Threshold
from teal_cli.model_loading import load_model
from teal_cli.models.architectures import find_projections
from teal_cli.sparse import make_intrinsic_
from teal_kernels import KEEP_ALL
from teal_kernels.launching import hopper_or_later
from teal_kernels.operands import Norm, Scratch
from teal_kernels.triton_gate_first import GateFirstConfig, GateLayer, launch_gate_first, step_config
from teal_kernels.triton_gemv import TileConfig, gemv, squares_of

# Relative norm error: float32 sums, and for 16 bits the roundings of x, gate, up and product; relu has no step.
LIMITS = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
SHAPES = [(11008, 4096), (14336, 4096), (13824, 5120), (1536, 576), (130, 200)]
EPS = 1e-5
GPU = torch.device("cuda", 0)
CONFIGS = {
    "loops": GateFirstConfig(neurons=4, block_out=1),
    "late": GateFirstConfig(neurons=8, block_out=4, block_in=512, unroll=2, gate_block_in=512, late=True),
    "tensor cores": step_config(4096, 4),
    "one warp": GateFirstConfig(16, 16, 64, 2, 1, 64, 2),
}


class Behind:
    """A residual product, and gate first behind it, which reads what that one leaves: x and its squares."""

    def __init__(self, shape: tuple[int, int], rows: int, dtype: torch.dtype) -> None:
        self.n_out, self.n_in = shape
        generator = torch.Generator("cuda").manual_seed(rows)

        def random(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device="cuda").to(dtype)

        self.before, self.start, self.table = random(rows, 256), random(rows, self.n_in), random(256, self.n_in)
        self.gate, self.up = (random(*shape) / self.n_in**0.5 for _ in range(2))
        self.weight = 1 + random(self.n_in) / 8
        self.config = TileConfig(block_out=128, block_in=4, unroll=4, inputs_per_chunk=128, warps=1)
        columns = squares_of(self.table, (self.n_in,), self.config, rows, dtype)
        self.squares = torch.zeros(rows, columns, device="cuda")
        self.scratch, self.keep_all = Scratch(GPU), torch.full((1,), KEEP_ALL, device="cuda")
        self.x, self.hidden = torch.empty_like(self.start), random(rows, self.n_out)
        self.live = torch.zeros(1, dtype=torch.int64, device="cuda")

    def run(self, config: GateFirstConfig, dense: bool) -> Tensor:
        """What down would read; the two launches overlap where the GPU can."""
        pdl = hopper_or_later(GPU)
        self.x.copy_(self.start)
        self.live.zero_()
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
        launch_gate_first(
            self.x,
            GateLayer(self.gate, None),
            self.up,
            None,
            self.hidden,
            kind="relu",
            threshold=0.0,
            norm=Norm(self.weight, EPS, self.squares),
            dense=dense,
            counts=self.live,
            config=config,
            pdl=pdl,
        )
        return self.hidden.clone()

    def expected(self) -> tuple[Tensor, Tensor]:
        """Gate and hidden state in float64, from the x that was written."""
        x = self.x.double()
        seen = x * torch.rsqrt(x.square().mean(1, keepdim=True) + EPS) * self.weight.double()
        gate = linear(seen, self.gate.double())
        return gate, gate.clamp_min(0) * linear(seen, self.up.double())


@torch.no_grad()
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 4, 8])
def test_behind_the_launch_that_writes_its_inputs(dtype: torch.dtype, shape: tuple[int, int], rows: int) -> None:
    case = Behind(shape, rows, dtype)
    config = step_config(shape[1], rows)
    for dense in (False, True):
        hidden = case.run(config, dense)
        gate, expected = case.expected()
        assert float((hidden.double() - expected).norm()) <= LIMITS[dtype] * float(expected.norm())
        undecided = int((gate.abs() < 16 * torch.finfo(dtype).eps).sum())
        assert abs(int(case.live) - (0 if dense else int((gate > 0).sum()))) <= undecided
        assert all(torch.equal(case.run(config, dense), hidden) for _ in range(20))


@torch.no_grad()
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dense", [False, True])
def test_every_cut(config: str, rows: int, dense: bool) -> None:
    case = Behind((11008, 4096), rows, torch.bfloat16)
    hidden = case.run(CONFIGS[config], dense)
    _, expected = case.expected()
    assert float((hidden.double() - expected).norm()) <= LIMITS[torch.bfloat16] * float(expected.norm())


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 4])
def test_rows_of_dead_neurons_are_not_read(rows: int) -> None:
    case = Behind((11008, 4096), rows, torch.bfloat16)
    config = step_config(4096, rows)
    expected = case.run(config, False)
    gate, _ = case.expected()
    case.up[(gate < -0.1).all(0)] = torch.nan
    assert torch.equal(case.run(config, False), expected)


@torch.no_grad()
@pytest.mark.usefixtures("skipping")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("thresholds", [False, True], ids=["zeros", "zeros and thresholds"])
@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_sessions_against_the_reference(tmp_path: Path, kind: str, rows: int, thresholds: bool, dtype: str) -> None:
    """In bfloat16 an input beside its threshold may fall on either side, so there both stand beside float32."""
    folder = save_kind(tmp_path / kind, kind)
    models = []
    for width in dict.fromkeys([dtype, "float32"]):
        model = load_model(folder, device="cuda", dtype=width)
        sites = {p.name: p.site.rpartition(".")[2] for p in find_projections(model)}
        rules: dict[str, Rule] = {
            name: Threshold(0.3, 0.5) for name, site in sites.items() if thresholds and site.startswith("attention")
        }
        make_intrinsic_(model, SparsityPlan("uniform", 0.5, rules) if thresholds else None)
        models.append(model)
    models[-1].load_state_dict(models[0].state_dict())
    for dense in (False, True):
        truth, _ = decoded(models[-1], rows, "general", dense)
        expected, counted = decoded(models[0], rows, "general", dense)
        logits, realised = decoded(models[0], rows, "fused", dense)
        errors = [float((found - truth).norm() / truth.norm()) for found in (logits, expected)]
        if dtype == "float32":
            assert errors[0] < 1e-4
            assert realised == pytest.approx(counted, abs=1e-9)
        else:
            assert errors[0] < 2 * errors[1] + 0.02
            assert realised == pytest.approx(counted, abs=0.05)
        assert bool(realised) != dense
