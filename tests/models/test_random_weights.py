"""Random weights: what writes to the residual stream is small, so that a deep model does not make rounding grow."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from teal_cli.decode.probe import TOLERANCE, difference
from teal_cli.models.aliases import require_alias
from teal_cli.models.loading import build_random_model, outline
from teal_cli.models.random_weights import residual_scale, shrink_residual_
from teal_cli.models.shards import plan_shards
from teal_cli.shard_loading import random_shard

TINY = {"hidden_size": 128, "intermediate_size": 448, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY |= {"vocab_size": 512, "max_position_embeddings": 64}


def _alias(name: str, **more: Any) -> Any:
    alias = require_alias(name)
    return replace(alias, shape={**alias.shape, **more})


def _built(name: str, **more: Any) -> Any:
    return build_random_model(_alias(name, **more), device="cpu", dtype="float32", seed=0)


def _deviation(layer: Any) -> float:
    return float(layer.weight.detach().float().std())


def test_only_what_writes_to_the_residual_stream_is_small() -> None:
    blocks = 3
    model = _built("llama-3-8b", **TINY, num_hidden_layers=blocks)
    plain = model.config.initializer_range
    for block in model.model.layers:
        for layer in (block.self_attn.o_proj, block.mlp.down_proj):
            assert _deviation(layer) == pytest.approx(plain * residual_scale(blocks), rel=0.05)
        for layer in (block.self_attn.q_proj, block.self_attn.v_proj, block.mlp.gate_proj, block.mlp.up_proj):
            assert _deviation(layer) == pytest.approx(plain, rel=0.05)
    assert _deviation(model.get_input_embeddings()) == pytest.approx(plain, rel=0.05)


def test_experts_too() -> None:
    shape = {**TINY, "intermediate_size": 192, "num_hidden_layers": 2, "num_local_experts": 4}
    model = _built("mixtral-8x7b", **shape)
    small = model.config.initializer_range * residual_scale(2)
    modules = ((name.rpartition(".")[2], module) for name, module in model.named_modules())
    found = {name: _deviation(module) for name, module in modules if hasattr(module, "weight")}
    assert found["down_proj"] == pytest.approx(small, rel=0.05)
    assert found["o_proj"] == pytest.approx(small, rel=0.05)


def test_shards_are_like_the_whole() -> None:
    alias = _alias("llama-3-8b", **TINY, num_hidden_layers=2)
    plan = plan_shards(outline(alias), 1, 2)
    shard = random_shard(alias, plan, torch.device("cpu"), dtype="float32", seed=0, projections=True)
    small = 0.02 * residual_scale(2)
    assert _deviation(shard.model.layers[1].mlp.down_proj) == pytest.approx(small, rel=0.05)
    assert _deviation(shard.model.layers[1].mlp.up_proj) == pytest.approx(0.02, rel=0.05)
    bare = random_shard(alias, plan, torch.device("cpu"), dtype="float32", seed=0, projections=False)
    assert bare.model.layers[0].mlp.down_proj.weight.is_meta


@torch.no_grad()
def test_rounding_does_not_grow_with_the_blocks() -> None:
    """Weights in proportion to the width, as those of a hidden state of 8,192."""
    shape = {**TINY, "num_hidden_layers": 100, "initializer_range": 1.81 / TINY["hidden_size"] ** 0.5}
    model = _built("llama-3-8b", **shape)
    model.get_input_embeddings().weight.mul_(0.02 / shape["initializer_range"])
    ids = torch.arange(12).view(1, -1)
    exact = model(ids).logits[0, -3:]
    error = difference(model.bfloat16()(ids).logits[0, -3:], exact)
    assert float(error.max()) < 0.5 * TOLERANCE[False][torch.bfloat16]


def test_a_model_without_a_program_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _built("llama-3-8b", **TINY, num_hidden_layers=1)
    before = model.model.layers[0].mlp.down_proj.weight.clone()
    monkeypatch.setattr("teal_cli.models.random_weights.program_for", lambda model: None)
    shrink_residual_(model)
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, before)
