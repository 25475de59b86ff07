"""The routed MLP in eager torch: what it computes, counts and skips, and checkpoints that carry routers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_model, save_tiny
from routed_models import SHARE, routed, text
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import linear, silu
from transformers import AutoModelForCausalLM

from teal_cli.checkpoint.plan import SparsityPlan, quantization_config
from teal_cli.checkpoint.rules import Dense, Rule, Threshold
from teal_cli.decode.engine import Engine
from teal_cli.decode.sampling import SamplingConfig
from teal_cli.errors import ArtefactError
from teal_cli.hf import TealConfig
from teal_cli.model_loading import load_model
from teal_cli.models.architectures import block_weights, find_projections
from teal_cli.sparse import Routed, control_of, sparsify_
from teal_cli.sparse.routed import RoutedMLP
from teal_cli.sparse.routing import plan_of_routers, routed_mlps, shares_left_out
from teal_cli.sparse.weight_bytes import weight_bytes_per_token


def _written_out(mlp: RoutedMLP, x: Tensor) -> Tensor:
    """In float64, a sum over the chosen groups; independently of the code under test."""
    router, group = mlp.router, mlp.group
    gate, up, down = (layer.weight.double() for layer in mlp.layers)
    x = x.double()
    seen = x if router.first is None else linear(x, router.first.double()).clamp_min(0)
    shares = torch.sigmoid(linear(seen, router.weight.double(), router.bias.double()))
    total = x.new_zeros(*x.shape[:-1], down.shape[0])
    for number in range(shares.shape[-1]):
        own = slice(number * group, (number + 1) * group)
        made = linear(silu(linear(x, gate[own])) * linear(x, up[own]), down[:, own])
        total += (shares[..., number : number + 1] > 0.5) * made
    return total


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("group", "rank"), [(4, None), (20, None), (1, 9)])
def test_against_a_sum_over_chosen_groups(group: int, rank: int | None, rows: int, tokens: int) -> None:
    """A step, which skips, and a prompt; dense and masked passes too."""
    model = routed(group=group, rank=rank)
    mlp, control = routed_mlps(model)[0], control_of(model)
    x = torch.randn(rows, tokens, 64, generator=torch.Generator().manual_seed(rows))
    expected = _written_out(mlp, x)
    passes = [mlp(x)]
    with control.dense():
        passes.append(mlp(x))
    with control.masked(0):
        passes.append(mlp(x))
    for found in passes:
        assert float((found - expected).norm() / expected.norm()) < 2e-6


@torch.no_grad()
def test_rows_that_no_token_chose_are_not_read() -> None:
    model = routed()
    mlp = routed_mlps(model)[0]
    mlp.router.bias[:2] = -1e3
    x = torch.randn(3, 1, 64)
    expected = mlp(x)
    for layer in mlp.layers[:2]:
        layer.weight[:8] = torch.nan
    assert torch.equal(mlp(x), expected)


@torch.no_grad()
def test_a_logit_that_is_no_number_chooses() -> None:
    mlp = routed_mlps(routed())[0]
    mlp.router.bias.fill_(torch.nan)
    for tokens in (1, 2):
        mlp.router.bias.fill_(torch.nan)
        found = mlp(torch.ones(1, tokens, 64))
        mlp.router.bias.fill_(1e3)
        assert torch.equal(found, mlp(torch.ones(1, tokens, 64)))


@torch.no_grad()
def test_soft_is_a_weighted_sum_and_trains_routers() -> None:
    mlp = routed_mlps(routed())[0]
    mlp.soft = True
    x = torch.randn(2, 5, 64)
    shares = torch.sigmoid(mlp.router(x)).repeat_interleave(4, -1)
    gate, up, down = mlp.layers
    assert torch.allclose(mlp(x), linear(silu(gate(x)) * up(x) * shares, down.weight), atol=1e-5)
    with torch.enable_grad():
        mlp(x).square().sum().backward()
        assert mlp.router.weight.grad is not None and bool(mlp.router.weight.grad.any())  # noqa: PT018
        mlp.router.zero_grad()
        mlp.soft = False
        mlp(x).square().sum().backward()
    assert mlp.router.weight.grad is None


@torch.no_grad()
def test_realised_sparsity_is_of_all_weights_and_less_what_routers_read() -> None:
    model = routed(group=4)
    control, ids = control_of(model), text(2, 12)
    with control.masked(4), control.counting() as counter:
        model(input_ids=ids, use_cache=False)
    realised, shares = counter.by_projection(), []
    for mlp in routed_mlps(model):
        gate, up, down = (realised[f"{mlp.path}.{name}"] for name in mlp.names)
        assert gate == up == down  # no neuron is zero by chance
        assert 0.3 < gate < 0.9
        shares.append(gate)
    weights = {p.name: p.parameters for p in find_projections(model)}
    skipped = sum(weights[name] * share for name, share in realised.items())
    routers = sum(mlp.router.weight.numel() for mlp in routed_mlps(model))
    assert counter.model_wide() == pytest.approx((skipped - routers) / block_weights(find_projections(model)))
    dense = weight_bytes_per_token(build_model("llama"), {})
    own = sum(p.nbytes for mlp in routed_mlps(model) for p in mlp.router.parameters())
    assert weight_bytes_per_token(model, realised) == pytest.approx(dense + own - 4 * skipped, abs=1)


@torch.no_grad()
def test_random_routers_leave_out_the_share_that_was_asked_for() -> None:
    for rank in (None, 16):
        model = routed(group=2, rank=rank)
        assert shares_left_out(model, text()) == [pytest.approx(SHARE, abs=0.02)] * 2


def _saved(model: Any, folder: Path) -> Path:
    plan = SparsityPlan("by hand", SHARE, {name: module.rule for name, module in _ruled(model)})
    model.config.quantization_config = TealConfig(**quantization_config(plan, None))
    model.save_pretrained(folder)
    return folder


def _ruled(model: Any) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "is_planned")]


@torch.no_grad()
@pytest.mark.parametrize("rank", [None, 8])
def test_a_checkpoint_loads_with_its_routers(rank: int | None, tmp_path: Path) -> None:
    """By plain from_pretrained, and by ours; saved again too."""
    sites = {p.name: p.site for p in find_projections(build_model("llama"))}
    elsewhere: dict[str, Rule] = {name: Threshold(0.3, 0.3) for name, site in sites.items() if "attention" in site}
    model = routed(rank=rank, elsewhere=elsewhere)
    folder = _saved(model, tmp_path / "out")
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert stored["version"] == 4
    entry = stored["projections"]["model.layers.0.mlp.down_proj"]
    assert entry == {"rule": "routed", "group": 4, "rank": rank, "sparsity": SHARE}
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    plain.save_pretrained(tmp_path / "again")
    again = load_model(tmp_path / "again", device="cpu", dtype="float32")
    ids = text(2, 9)
    for other in (plain, again):
        assert [mlp.rule for mlp in routed_mlps(other)] == [Routed(4, rank, SHARE)] * 2
        assert torch.equal(other(ids).logits, model(ids).logits)
        found, expected = (list(_steps(each)) for each in (other, model))
        assert found == expected
    assert weight_bytes_per_token(plain, {}) == weight_bytes_per_token(model, {})
    half = load_model(folder, device="cpu", dtype="bfloat16")
    assert {p.dtype for mlp in routed_mlps(half) for p in mlp.router.parameters()} == {torch.bfloat16}


def _steps(model: Any) -> Any:
    return Engine(model, path="general").generate(text(1, 6), max_new_tokens=5, sampling=SamplingConfig())


@pytest.mark.parametrize("missing", ["weight", "bias"])
def test_a_checkpoint_without_a_router_is_refused(missing: str, tmp_path: Path) -> None:
    """transformers would fill it with random numbers, or with whatever is in memory."""
    file = _saved(routed(), tmp_path / "out") / "model.safetensors"
    tensors = load_file(file)
    tensors.pop(f"model.layers.1.mlp.router.{missing}")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ArtefactError, match=rf"lack model.layers.1.mlp.router.{missing}: the routers"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with pytest.raises(ArtefactError, match=r"model.layers.1.mlp.router"):
        load_model(tmp_path / "out", device="cpu", dtype="float32")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"rule": "routed", "sparsity": 0.5}, r"a.group: Field required"),
        ({"rule": "routed", "sparsity": 0.5, "group": 0}, r"a.group: Input should be greater"),
        ({"rule": "routed", "sparsity": None, "group": 4}, r"a.sparsity: Field required"),
        ({"rule": "routed", "sparsity": 0.5, "group": 4, "rank": 0}, r"a.rank: Input should be greater"),
        ({"rule": "routed", "sparsity": 0.5, "group": 4}, "were altered"),
    ],
)
def test_a_broken_rule_is_one_clear_error(entry: dict[str, object], message: str) -> None:
    plan = SparsityPlan("x", 0.5, {"a": Routed(4, None, 0.5)})
    stored = quantization_config(plan, None)
    assert SparsityPlan.from_dict(stored) == plan
    with pytest.raises(ArtefactError, match=message):
        SparsityPlan.from_dict(stored | {"projections": {"a": entry}, "target_sparsity": 0.25})


def test_what_cannot_be_routed() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Routed(0, None, 0.5)
    with pytest.raises(ArtefactError, match="100 neurons of model.layers.0.mlp are no whole number of groups of 32"):
        routed(group=32)
    with pytest.raises(ArtefactError, match="opt has no gated MLP"):
        plan_of_routers(build_model("opt"), Routed(4, None, 0.5))
    model = build_model("llama")
    rules = plan_of_routers(model, Routed(4, None, 0.5)).projections
    with pytest.raises(ArtefactError, match=r"so gate_proj of it can have no rule"):
        sparsify_(model, SparsityPlan("x", 0.5, rules | {"model.layers.1.mlp.gate_proj": Dense()}))
    with pytest.raises(ArtefactError, match=r"q_proj reads, which is no down layer"):
        sparsify_(
            build_model("llama"), SparsityPlan("x", 0.5, {"model.layers.0.self_attn.q_proj": Routed(4, None, 0.5)})
        )
    with pytest.raises(ArtefactError, match="routed neurons are skipped in weights that are not quantised"):
        quantization_config(SparsityPlan("x", 0.5, rules), {"projections": "int8", "output": None})


def test_an_mlp_that_is_more_than_gated_is_refused(tmp_path: Path) -> None:
    model = load_model(save_tiny(tmp_path / "dense"), device="cpu", dtype="float32")
    plan = plan_of_routers(model, Routed(4, None, 0.5))
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: 2 * type(mlp).forward(mlp, x)
    with pytest.raises(ArtefactError, match=r"layers.1.mlp is more than"):
        sparsify_(model, plan)
