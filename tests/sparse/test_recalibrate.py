"""Thresholds of the sparse network: on the text that set them they realise what was asked."""

from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, build_model, calibrate_tiny, save_tiny

from teal_cli.allocation import make_plan
from teal_cli.errors import ArtefactError
from teal_cli.evaluation.perplexity import compare
from teal_cli.sparse import control_of, recalibrate_, sparse_layers, sparsify_


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("allocation", ["uniform", "fisher"])
def test_realised_is_the_target(family: str, allocation: str, tmp_path: Path) -> None:
    calibration = calibrate_tiny(save_tiny(tmp_path / "m", family))
    model = build_model(family)
    plan = make_plan(calibration, 0.65, allocation)
    sparsify_(model, plan)
    text = torch.randint(2, VOCABULARY, (3, 64), generator=torch.Generator().manual_seed(1))
    held = recalibrate_(model, plan, text, dense_prefix=32)
    assert {n: e.expected_sparsity for n, e in held.projections.items()} == {
        n: e.expected_sparsity for n, e in plan.projections.items()
    }
    ((before,), (after,)) = compare(model, [plan, held], text, dense_prefixes=[32])
    assert after.realised_sparsity == pytest.approx(0.65, abs=0.002)
    assert abs(before.realised_sparsity - 0.65) > 0.01  # what plain thresholds give here
    for name, realised in after.realised_by_projection.items():
        assert realised == pytest.approx(held.projections[name].expected_sparsity, abs=0.01)
    assert not any(layer._forward_pre_hooks for layer in sparse_layers(model).values())
    assert control_of(model).mode == "auto"


def test_dense_projections_stay_dense(tmp_path: Path) -> None:
    calibration = calibrate_tiny(save_tiny(tmp_path / "m"))
    model = build_model("llama")
    plan = make_plan(calibration, 0.0, "uniform")
    sparsify_(model, plan)
    assert recalibrate_(model, plan, torch.randint(2, VOCABULARY, (2, 32)), dense_prefix=16) == plan


def test_hidden_states_without_a_threshold(tmp_path: Path) -> None:
    calibration = calibrate_tiny(save_tiny(tmp_path / "m"))
    model = build_model("llama")
    plan = make_plan(calibration, 0.5, "uniform")
    sparsify_(model, plan)
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.fill_(float("nan"))
    with pytest.raises(ArtefactError, match="layers.1.self_attn.q_proj: .*not finite"):
        recalibrate_(model, plan, torch.randint(2, VOCABULARY, (2, 32)), dense_prefix=16)
