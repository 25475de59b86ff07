"""What each rank holds: together all of a model, and nothing twice but keys and values that ranks share."""

import pytest
import torch
from conftest import build_model
from torch import Tensor

from teal_cli.errors import UsageError
from teal_cli.models.shards import Cut, head_spans, plan_shards, spans_of
from teal_cli.quantise.rounding import quantise
from teal_cli.schemes import Scheme
from teal_cli.shard_loading import cut_packed
from teal_kernels.packing import dequantised


@pytest.mark.parametrize(("size", "count", "unit"), [(100, 2, 16), (10, 3, 1), (1536, 2, 128), (7, 7, 1)])
def test_spans_follow_one_another(size: int, count: int, unit: int) -> None:
    spans = spans_of(size, count, unit)
    assert [start for start, _ in spans] == [0, *(stop for _, stop in spans[:-1])]
    assert spans[-1][1] == size
    assert all(start % unit == 0 for start, _ in spans)
    lengths = [stop - start for start, stop in spans]
    assert max(lengths) - min(lengths) < 2 * unit  # one unit, and what the last lacks


def test_too_few_to_divide() -> None:
    with pytest.raises(ValueError, match="cannot be divided by 3"):
        spans_of(32, 3, 16)


@pytest.mark.parametrize(("heads", "kv_heads", "count"), [(9, 3, 2), (8, 2, 2), (8, 2, 4), (8, 8, 4), (32, 8, 16)])
def test_each_query_head_finds_its_key_head(heads: int, kv_heads: int, count: int) -> None:
    seen = []
    for rank in range(count):
        (start, stop), (first, last) = head_spans(heads, kv_heads, rank, count)
        seen += range(start, stop)
        group = (stop - start) // (last - first)
        for head in range(start, stop):
            assert first + (head - start) // group == head // (heads // kv_heads)
    assert seen == list(range(heads))


def test_heads_that_cannot_be_divided() -> None:
    with pytest.raises(ValueError, match="9 heads and 3 key heads cannot be divided by 4"):
        head_spans(9, 3, 0, 4)


def held(model: torch.nn.Module, name: str, count: int) -> list[Tensor]:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return [plan_shards(model, rank, count).cuts[name].of_weight(weight) for rank in range(count)]


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_all_shards_are_the_model(family: str) -> None:
    model = build_model(family)
    plan = plan_shards(model, 1, 2)
    assert plan.heads == (2, 4)
    assert plan.neurons == (64, 100)
    for name, cut in plan.cuts.items():
        weight, parts = model.get_submodule(name).weight, held(model, name, 2)
        if len(cut.spans) == 1:
            assert torch.equal(torch.cat(parts, dim=0 if cut.side == "outputs" else 1), weight)
        else:  # of each rank its part of every projection
            assert sum(len(part) for part in parts) == len(weight)
    output = model.get_output_embeddings().weight
    both = torch.cat([plan_shards(model, rank, 2).of_output(output) for rank in range(2)])
    assert torch.equal(both[: len(output)], output)


def test_four_ranks_share_two_key_heads() -> None:
    model = build_model("llama")
    keys = held(model, "model.layers.0.self_attn.k_proj", 4)
    assert torch.equal(keys[0], keys[1])
    assert torch.equal(torch.cat([keys[0], keys[2]]), model.get_submodule("model.layers.0.self_attn.k_proj").weight)


@pytest.mark.parametrize("family", ["mixtral", "bloom", "olmo2"])
def test_what_is_not_divided_is_refused(family: str) -> None:
    with pytest.raises(UsageError, match=r"tensor_parallel 2 \(flag --tensor-parallel\): model type"):
        plan_shards(build_model(family), 0, 2)


@pytest.mark.parametrize("scheme", ["int8", "int4:32"])
@pytest.mark.parametrize(
    "cut", [Cut("outputs", ((8, 24),)), Cut("inputs", ((32, 96),)), Cut("outputs", ((0, 8), (16, 24)))]
)
def test_codes_of_a_shard_stand_for_its_weights(scheme: str, cut: Cut) -> None:
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(0))
    whole = quantise(weight, Scheme.parse(scheme))
    part = cut_packed(whole, cut, "layer")
    assert torch.equal(dequantised(part, torch.float32).t(), cut.of_weight(dequantised(whole, torch.float32).t()))


@pytest.mark.parametrize(
    ("cut", "share"),
    [(Cut("outputs", ((4, 24),)), "8 of its outputs share a word"), (Cut("inputs", ((16, 96),)), "32 of")],
)
def test_no_group_and_no_word_is_divided(cut: Cut, share: str) -> None:
    whole = quantise(torch.randn(24, 96), Scheme.parse("int4:32"))
    with pytest.raises(UsageError, match=f"layer cannot be divided at .*: {share}"):
        cut_packed(whole, cut, "layer")
