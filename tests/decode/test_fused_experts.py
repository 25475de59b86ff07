"""Mixtures of experts on the fused path, in Triton's interpreter, against float64 masked maths."""

import pytest
import torch
from fused_pair import random_tokens, use_small_tiles
from native_models import ALL_MIXTURES, check_steps, plan_for, sparse, tiny

from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.checkpoint.rules import Dense
from teal_cli.decode.blocks import Product, block_steps
from teal_cli.decode.engine import Engine
from teal_cli.decode.paths import fused_experts
from teal_cli.decode.paths.fused import FusedPath
from teal_cli.decode.paths.fused_session import FusedSession
from teal_cli.decode.paths.native import NativePath
from teal_cli.models.architectures import architecture_of
from teal_cli.sparse import control_of, sparsify_
from teal_cli.sparse.experts import SparseExperts


@pytest.fixture(autouse=True)
def _small_tiles(own_tables: None, monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_tiles(monkeypatch)


@pytest.mark.parametrize("family", ALL_MIXTURES)
def test_every_mixture_is_served(family: str) -> None:
    program = architecture_of(family).program
    assert program is not None
    assert program.fused
    model = sparse(tiny(family))
    assert FusedPath.unsupported(model, control_of(model)) is None


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "granitemoe", "gpt_oss"])
def test_dense_tokens(family: str) -> None:
    model = sparse(tiny(family))
    control_of(model).enabled = False
    check_steps(model, [12, 7], 2, path="fused")


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe"])
def test_16_bits(family: str) -> None:
    model = sparse(tiny(family).bfloat16())
    control_of(model).enabled = False
    check_steps(model, [12], 2, path="fused")


def test_one_of_two_products_is_dense() -> None:
    """Inputs of down are dropped, those of gate and up are not."""
    model = tiny("mixtral")
    rules = plan_for(model, "alike").projections
    changed = {name: Dense() if "gate_up" in name else rule for name, rule in rules.items()}
    sparsify_(model, SparsityPlan("uniform", 0.5, changed))
    check_steps(model, [12], 2, path="fused")


@pytest.mark.parametrize(
    ("family", "scheme"),
    [
        *(("mixtral", "int8"), ("mixtral", "int4:32"), ("qwen2_moe", "int8"), ("granitemoe", "int4:32")),
        *(("gpt_oss", "int8"), ("gpt_oss", "int4:32")),
    ],
)
def test_codes(family: str, scheme: str) -> None:
    """Neurons in whole words, and groups that one expert's inputs do not fill."""
    sizes = {"intermediate_size": 112, "moe_intermediate_size": 48} if family != "granitemoe" else {}
    model = sparse(tiny(family, **sizes), scheme=scheme)
    check_steps(model, [12], 2, path="fused")


def test_codes_that_end_inside_a_word() -> None:
    model = sparse(tiny("mixtral", intermediate_size=100), scheme="int4:32")
    assert FusedPath.unsupported(model, control_of(model)) == (
        "codes of 100 outputs of experts_input that end inside a word"
    )


def test_a_batch_of_eight() -> None:
    check_steps(sparse(tiny("mixtral")), [6] * 8, 1, path="fused")


def test_counts_of_one_launch_are_those_of_all_experts() -> None:
    """Two of four experts: each input of the block counts twice, and their weights are what is read."""
    model = sparse(tiny("mixtral"))
    engine = Engine(model, path="fused")
    cache = engine.new_cache(8)
    engine.prefill(random_tokens(1, 4), cache)
    with control_of(model).counting():
        engine.step(random_tokens(1, 1), cache)
        session = engine.open(cache)
        assert isinstance(session, FusedSession)
        (name,) = {n for n, m in model.named_modules() if isinstance(m, SparseExperts) and "0.mlp.experts.gate" in n}
        (counted,) = (entry for entry in session.counted() if entry.name == name)
    assert counted.seen == 2 * 64
    assert counted.parameters == 2 * 64 * 200


def test_experts_that_cannot_be_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sparse(tiny("qwen2_moe"))
    block = block_steps(model)[0]
    scale = next(step.scaled_by for step in block if isinstance(step, Product) and step.scaled_by is not None)
    scale.bias = torch.nn.Parameter(torch.zeros(1))
    assert "layer with a bias" in str(FusedPath.unsupported(model, control_of(model)))
    scale.bias = None
    layer = model.model.layers[0].mlp.experts.down_proj
    turned = layer.weight.data
    layer.weight.data = turned.contiguous()
    assert FusedPath.unsupported(model, control_of(model)) == "experts that do not lie input-major"
    layer.weight.data = turned
    assert FusedPath.unsupported(model, control_of(model)) is None
    monkeypatch.setattr(fused_experts, "MAX_EXPERTS", 3)
    assert FusedPath.unsupported(model, control_of(model)) == "more than 3 experts"


@torch.no_grad()
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_a_dense_mixture_is_laid_out(family: str) -> None:
    """As `--sparsity 0` has it on a GPU: no layer is sparse before."""
    model, token = tiny(family), random_tokens(1, 1, seed=1)
    expected = model(input_ids=torch.cat([random_tokens(1, 8), token], dim=1)).logits[:, -1]
    engine = Engine(model, path="fused")
    cache = engine.new_cache(9)
    engine.prefill(random_tokens(1, 8), cache)
    assert float((engine.step(token, cache) - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("left_out", ["experts", "down_proj", "gate_up_proj", "q_proj", "k_proj", "self_attn"])
def test_plans_that_leave_projections_out(left_out: str) -> None:
    """Neither path reads a table that is not there, or not whole."""
    model = tiny("mixtral")
    plan = plan_for(model, "alike")
    for name in [name for name in plan.projections if left_out in name]:
        del plan.projections[name]
    control = sparsify_(model, plan)
    assert FusedPath.unsupported(model, control) == "projections that the plan leaves out"
    experts = left_out not in ("q_proj", "k_proj", "self_attn")
    assert NativePath.unsupported(model, control) == ("experts that the plan leaves out" if experts else None)
