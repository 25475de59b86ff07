"""Which projections of a plan a layer of vLLM holds."""

import pytest

from teal_cli.checkpoint.rules import Dense, Threshold, Zeros
from teal_cli.errors import ArtefactError
from teal_cli.vllm_plugin.projections import LayerRules, PlannedLayers
from teal_kernels import KEEP_ALL

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
BLOCK = "model.layers.0."


def _plan(*names: str) -> PlannedLayers:
    return PlannedLayers({f"{BLOCK}{name}": Threshold(0.5, 0.4) for name in names})


def test_merged_projections_have_their_own_rules() -> None:
    q, v = Threshold(0.5, 0.4), Threshold(0.25, 0.2)
    planned = PlannedLayers({f"{BLOCK}q_proj": q, f"{BLOCK}v_proj": v})
    assert planned.rules_of(f"{BLOCK}qkv_proj", PACKED) == [q, Dense(), v]
    assert planned.rules_of("model.layers.1.qkv_proj", PACKED) is None
    assert planned.rules_of(f"{BLOCK}q_proj", {}) == [q]


def test_neighbours_with_one_threshold_are_one_part() -> None:
    q, k, v = Threshold(0.5, 0.4), Threshold(0.5, 0.2), Dense()
    rules = LayerRules.of([q, k, v], [60, 20, 20])
    assert (rules.parts, rules.bounds) == ([80, 20], [0.5, KEEP_ALL])
    assert rules.sparsity == pytest.approx((60 * 0.4 + 20 * 0.2) / 100)
    assert LayerRules.of([q], [60, 20, 20]).parts == [100]  # merged in the checkpoint too
    assert LayerRules.of([Zeros()], [10]).bounds == [0.0]


def test_what_does_not_fit_is_refused() -> None:
    rules = [Threshold(bound, 0.4) for bound in (0.1, 0.2, 0.3, 0.4)]
    with pytest.raises(ArtefactError, match="a layer of 3 parts for 2 projections"):
        LayerRules.of(rules[:2], [1, 1, 1])
    with pytest.raises(ArtefactError, match="a layer of 4 parts"):
        LayerRules.of(rules, [1, 1, 1, 1])


def test_rules_that_no_layer_follows_are_an_error() -> None:
    planned = _plan("q_proj", "experts.gate_up_proj")
    planned.rules_of(f"{BLOCK}q_proj", {})
    with pytest.raises(ArtefactError, match=r"of 1 projections \(model.layers.0.experts.gate_up_proj\)"):
        planned.check_complete()
    planned.rules_of(f"{BLOCK}experts.gate_up_proj", {})
    planned.check_complete()


def test_blocks_of_other_processes_are_theirs() -> None:
    planned = PlannedLayers({f"model.layers.{block}.q_proj": Threshold(0.5, 0.4) for block in (0, 1)})
    planned.rules_of("model.layers.1.q_proj", {})
    planned.check_complete()


def test_a_model_may_multiply_with_its_embeddings() -> None:
    planned = PlannedLayers({"lm_head": Threshold(0.5, 0.4), f"{BLOCK}q_proj": Threshold(0.5, 0.4)})
    planned.rules_of(f"{BLOCK}q_proj", {})
    planned.check_complete()
    assert planned.misses_output_layer
    planned.rules_of("lm_head", {})
    assert not planned.misses_output_layer


def test_projections_may_have_other_names_in_vllm() -> None:
    planned = _plan("q_proj")
    planned.rename(lambda rules: {f"language.{name}": rule for name, rule in rules.items()})
    assert planned.rules_of(f"language.{BLOCK}q_proj", {}) is not None
    named = PlannedLayers({"lm_head": Threshold(0.5, 0.4)})
    assert named.rules_of(".lm_head", {}) is not None
