"""Stacked experts: where nothing is skipped, transformers' own function computes them on the same weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import FAMILIES, build_family, build_model
from fused_pair import random_tokens
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.checkpoint.rules import Threshold
from teal_cli.decode.engine import Engine
from teal_cli.models.architectures import find_projections
from teal_cli.models.layers import _Stacks, gathered_experts, unstack_experts_
from teal_cli.sparse import sparsify_

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@contextmanager
def _calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Rows of each call of transformers' function."""
    seen: list[int] = []
    real = ALL_EXPERTS_FUNCTIONS["grouped_mm"]

    def counted(experts: Any, hidden_states: Tensor, *rest: Tensor) -> Tensor:
        seen.append(len(hidden_states))
        found: Tensor = real(experts, hidden_states, *rest)
        return found

    with monkeypatch.context() as patch:
        patch.setitem(ALL_EXPERTS_FUNCTIONS._local_mapping, "grouped_mm", counted)
        yield seen


def _plan(model: torch.nn.Module) -> SparsityPlan:
    return SparsityPlan("uniform", 0.5, {p.name: Threshold(0.5, 0.5) for p in find_projections(model)})


@pytest.fixture(autouse=True)
def _rows_of_sixteen_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "mixtral", FAMILIES["mixtral"] | {"intermediate_size": 96})


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_dense_experts_have_the_bits_of_transformers(family: str, dtype: torch.dtype) -> None:
    plain, ours = build_model(family).to(dtype), build_family(family).to(dtype)
    for tokens in (20, 1):
        ids = random_tokens(2, tokens)
        assert torch.equal(ours(input_ids=ids).logits, plain(input_ids=ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prompt_and_dense_steps_are_those_of_transformers(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a sparse model, whose weights lie input-major: equal but for rounding, and together."""
    plain, model = build_model("mixtral").to(dtype), build_family("mixtral").to(dtype)
    control = sparsify_(model, _plan(model))
    engine, ids, blocks = Engine(model, path="general"), random_tokens(1, 20), len(model.model.layers)
    cache = engine.new_cache(24)
    with _calls(monkeypatch) as calls:
        got = [engine.prefill(ids, cache)]
        assert calls == [20] * blocks
        with control.switched_off():
            got.append(engine.step(ids[:, :1], cache))
        assert calls == [20] * blocks + [1] * blocks
        engine.step(ids[:, :1], cache)  # sparse: each expert skips inputs of its own rows
        assert len(calls) == 2 * blocks
    expected = plain(input_ids=torch.cat([ids, ids[:, :1]], dim=1)).logits[0, -2:].double()
    error = (torch.cat(got).double() - expected).norm() / expected.norm()
    assert error < (1e-5 if dtype == torch.float32 else 0.03)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gathered_experts_compute_the_same(dtype: torch.dtype) -> None:
    """What compiled steps run on a GPU, here as it stands."""
    experts = build_family("mixtral").to(dtype).model.layers[0].mlp.experts
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 64, generator=generator).to(dtype)
    index, weights = torch.tensor([[0, 3], [2, 0], [1, 2]]), torch.rand(3, 2, generator=generator)
    expected = experts(x, index, weights).double()
    for turned in (False, True):
        if turned:
            for layer in (experts.gate_up_proj, experts.down_proj):
                layer.weight.data = layer.weight.data.transpose(1, 2).contiguous().transpose(1, 2)
        got = gathered_experts(_Stacks(experts), x, index, weights)
        assert got.dtype == dtype
        assert (got.double() - expected).norm() / expected.norm() < (1e-6 if dtype == torch.float32 else 0.01)


@torch.no_grad()
def test_whoever_watches_a_projection_sees_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration by hooks, and counting."""
    model, ids = build_family("mixtral"), random_tokens(1, 12)
    down, seen = model.model.layers[0].mlp.experts.down_proj, []
    handle = down.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    with _calls(monkeypatch) as calls:
        expected = model(input_ids=ids).logits
        assert seen == [2 * 12]
        assert len(calls) == 1
        handle.remove()
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
        assert (len(seen), len(calls)) == (1, 3)
    control = sparsify_(model, _plan(model))
    with control.masked(4), control.counting() as counter:
        model(input_ids=ids)
    names = {p.name for p in find_projections(model) if "experts" in p.name}
    assert names <= set(counter.by_projection())


@torch.no_grad()
def test_what_the_grouped_product_does_not_take_is_computed_one_by_one() -> None:
    """Rows of no multiple of 16 bytes, on which transformers fails, and float64.

    Of 16 bits rounding chooses another expert for a token or two: most of them count.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "mixtral", FAMILIES["mixtral"] | {"intermediate_size": 100})
        plain, ids = build_model("mixtral"), random_tokens(1, 12)
    expected = plain(input_ids=ids).logits.double()
    unstack_experts_(plain)
    for dtype, limit in ((torch.float64, 1e-5), (torch.bfloat16, 0.05)):
        got = plain.to(dtype)(input_ids=ids).logits.double()
        assert ((got - expected).norm(dim=-1) / expected.norm(dim=-1)).quantile(0.7) < limit
