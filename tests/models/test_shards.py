"""What each rank holds: together all of a model, and nothing twice but keys and values that ranks share."""

import pytest
import torch
from conftest import build_family, build_model
from tiny_configs import ALL_MIXTURES
from torch import Tensor

from teal_cli.errors import UsageError
from teal_cli.models.cuts import Cut, head_spans, spans_of
from teal_cli.models.shards import plan_shards
from teal_cli.models.stored_names import in_order, places
from teal_cli.quantise.rounding import quantise
from teal_cli.schemes import Scheme
from teal_cli.shard_loading import cut_packed
from teal_kernels.experts import expert_of, stacked
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
    assert plan.neurons == {100: (64, 100)}
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


@pytest.mark.parametrize("family", ALL_MIXTURES)
def test_all_ranks_have_a_share_of_every_expert(family: str) -> None:
    model = build_family(family)
    plans = [plan_shards(model, rank, 2) for rank in range(2)]
    stacks = [name for name in plans[0].cuts if name.endswith(("gate_up_proj", "down_proj")) and ".experts." in name]
    assert stacks
    for name in stacks:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        parts = [plan.cuts[name].of_weight(weight) for plan in plans]
        assert {len(part) for part in parts} == {len(weight)}
        if name.endswith("down_proj"):
            assert torch.equal(torch.cat(parts, dim=-1), weight)
        elif family == "gpt_oss":  # gate and up alternate
            assert torch.equal(torch.cat(parts, dim=1), weight)
        else:
            halves = (torch.cat([part.chunk(2, dim=1)[nth] for part in parts], dim=1) for nth in range(2))
            assert torch.equal(torch.cat(list(halves), dim=1), weight)
    routers = [name for name, _ in model.named_parameters() if ".router." in name or ".gate.weight" in name]
    assert routers
    assert all(plans[0].cut_at(name) is None for name in routers)


def test_one_rank_adds_the_biases_of_experts() -> None:
    bias = build_family("gpt_oss").get_parameter("model.layers.0.mlp.experts.down_proj_bias")
    plans = [plan_shards(build_family("gpt_oss"), rank, 2) for rank in range(2)]
    parts = [plan.cuts["model.layers.0.mlp.experts.down_proj_bias"].of_bias(bias) for plan in plans]
    assert torch.equal(parts[0], bias)
    assert not parts[1].any()


def test_groups_of_neurons_that_cannot_be_divided() -> None:
    with pytest.raises(UsageError, match="48 in units of 32 cannot be divided by 4"):
        plan_shards(build_family("olmoe"), 0, 4, group=32)


def test_experts_of_files_stand_in_the_order_of_their_numbers() -> None:
    layer = "model.layers.0.mlp.experts"
    keys = [f"{layer}.{number}.{own}.weight" for number in (0, 2, 10) for own in ("gate_proj", "up_proj", "down_proj")]
    found = places([*keys, "model.layers.0.mlp.gate.weight", "nothing.of.the.model"], build_family("olmoe"))
    assert found[f"{layer}.2.up_proj.weight"] == (f"{layer}.gate_up_proj", 1, 2, True)
    assert found[f"{layer}.10.down_proj.weight"] == (f"{layer}.down_proj", 0, 1, True)
    assert found["model.layers.0.mlp.gate.weight"] == ("model.layers.0.mlp.gate.weight", 0, 1, False)
    assert "nothing.of.the.model" not in found
    assert in_order([keys[6], keys[3], keys[0]]) == [keys[0], keys[3], keys[6]]


@pytest.mark.parametrize("family", ["falcon", "bloom", "bitnet"])
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


@pytest.mark.parametrize("cut", [Cut("outputs", ((0, 8), (16, 24))), Cut("inputs", ((32, 96),))])
def test_codes_of_experts_are_cut_alike(cut: Cut) -> None:
    weights = torch.randn(3, 24, 96, generator=torch.Generator().manual_seed(0))
    whole = stacked([quantise(weight, Scheme.parse("int4:32")) for weight in weights])
    part = cut_packed(whole, cut, "layer")
    for nth in range(3):
        expected = cut.of_weight(dequantised(expert_of(whole, nth), torch.float32).t())
        assert torch.equal(dequantised(expert_of(part, nth), torch.float32).t(), expected)


@pytest.mark.parametrize(
    ("cut", "share"),
    [(Cut("outputs", ((4, 24),)), "8 of its outputs share a word"), (Cut("inputs", ((16, 96),)), "32 of")],
)
def test_no_group_and_no_word_is_divided(cut: Cut, share: str) -> None:
    whole = quantise(torch.randn(24, 96), Scheme.parse("int4:32"))
    with pytest.raises(UsageError, match=f"layer cannot be divided at .*: {share}"):
        cut_packed(whole, cut, "layer")
