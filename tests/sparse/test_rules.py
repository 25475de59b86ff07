"""The rules of skipping: what they mean, how files say them, and plans that mix them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCABULARY, MaskedReference, calibrate_tiny, save_tiny
from intrinsic_models import save_kind
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

import teal_cli.hf
from teal_cli.allocation import make_plan
from teal_cli.checkpoint.export import check_checkpoint, write_checkpoint
from teal_cli.checkpoint.plan import SparsityPlan, quantization_config
from teal_cli.errors import ArtefactError
from teal_cli.model_loading import load_model
from teal_cli.sparse import (
    Dense,
    SparseLinear,
    Threshold,
    Zeros,
    control_of,
    make_intrinsic_,
    sparse_layers,
    sparsify_,
)
from teal_cli.sparse.gate_first import GateFirstMLP
from teal_kernels import KEEP_ALL

assert teal_cli.hf
PLAN = SparsityPlan("mixed", 0.25, {"a": Dense(), "b": Threshold(0.5, 0.4), "c": Zeros(), "d": Zeros(0.75)})


def _tokens(length: int) -> Tensor:
    return torch.randint(2, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0))


def test_what_kernels_and_estimates_get() -> None:
    assert [rule.threshold for rule in PLAN.projections.values()] == [KEEP_ALL, 0.5, 0.0, 0.0]
    assert [rule.expected_sparsity for rule in PLAN.projections.values()] == [0.0, 0.4, None, 0.75]


@pytest.mark.parametrize(("threshold", "sparsity"), [(-0.1, 0.5), (0.1, 0.0), (0.1, 1.0), (float("nan"), 0.5)])
def test_thresholds_that_cannot_be(threshold: float, sparsity: float) -> None:
    with pytest.raises(ValueError, match="threshold"):
        Threshold(threshold, sparsity)
    with pytest.raises(ValueError, match="expected sparsity"):
        Zeros(1.0)


def test_files_keep_every_rule() -> None:
    stored = json.loads(json.dumps(quantization_config(PLAN, None)))
    assert stored["version"] == 3
    assert stored["projections"] == {
        "a": {"sparsity": 0.0, "threshold": 0.0},
        "b": {"sparsity": 0.4, "threshold": 0.5},
        "c": {"rule": "zeros", "sparsity": None},
        "d": {"rule": "zeros", "sparsity": 0.75},
    }
    assert SparsityPlan.from_dict(stored) == PLAN


def test_a_file_from_before_there_were_rules() -> None:
    """Digest and seal as they were written then; a dense projection could have a threshold."""
    entries = {"a": {"sparsity": 0.0, "threshold": 9.0}, "b": {"sparsity": 0.5, "threshold": 0.25}}
    old: dict[str, Any] = {"quant_method": "teal", "version": 1, "allocation": "by hand", "target_sparsity": 0.25}
    old |= {
        "projections": entries,
        "sha256": "11ebd924c67eb3b6ebbd80073ccd0afd8840ffa8bbe3e6bed6d942c75e715750",
        "content_sha256": "ab888a890f2b55c12a5a3cead2dd93ff97d8d870f5e6c7614c39e8a8d4488d45",
    }
    assert SparsityPlan.from_dict(old).projections == {"a": Dense(), "b": Threshold(0.25, 0.5)}


@pytest.mark.parametrize(
    ("entry", "version", "message"),
    [
        ({"rule": "router", "sparsity": 0.5}, 3, r"projections.a.rule: Input should be 'zeros'"),
        ({"rule": "zeros"}, 3, r"projections.a.sparsity: Field required"),
        ({"rule": "zeros", "sparsity": 1.0}, 3, r"projections.a.sparsity: Input should be less than 1"),
        ({"rule": "zeros", "sparsity": 0.5}, 1, "format version 1, this teal reads 3"),
        ({"sparsity": None, "threshold": 0.1}, 1, r"projections.a.sparsity: Field required"),
        ({"sparsity": 0.5, "threshold": None}, 1, r"projections.a.threshold: Field required"),
        ({"rule": "zeros", "sparsity": 0.5}, 3, "were altered"),
    ],
)
def test_a_broken_rule_is_one_clear_error(entry: dict[str, object], version: int, message: str) -> None:
    stored = quantization_config(PLAN, None) | {"version": version, "projections": {"a": entry}}
    with pytest.raises(ArtefactError, match=message):
        SparsityPlan.from_dict(stored)


def test_zeros_are_not_for_quantised_weights() -> None:
    with pytest.raises(ArtefactError, match="without --quantize"):
        quantization_config(PLAN, {"projections": "int8", "output": None})
    stored = quantization_config(PLAN, None) | {"quantization": {"projections": "int8", "output": None}}
    with pytest.raises(ArtefactError, match="zeros to skip in quantised weights"):
        SparsityPlan.from_dict(stored)


@pytest.fixture(params=["relu", "fatrelu", "bamboo"])
def dense(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_kind(tmp_path / "dense", request.param)


@torch.no_grad()
def test_thresholds_on_attention_with_zeros_in_the_mlp(dense: Path, tmp_path: Path) -> None:
    """By make_intrinsic_, by sparsify_ and by plain from_pretrained: the same model, and the masked maths."""
    calibration = calibrate_tiny(dense)
    made = load_model(dense, device="cpu", dtype="float32")
    plan = make_intrinsic_(made, make_plan(calibration, 0.5, "uniform"))
    kinds = {name.rpartition(".")[2]: type(rule) for name, rule in plan.projections.items()}
    assert kinds == {**dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), Threshold), "down_proj": Zeros}
    write_checkpoint(dense, plan, calibration, tmp_path / "out", "link")
    assert check_checkpoint(tmp_path / "out") == plan
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    by_plan = load_model(dense, device="cpu", dtype="float32")
    sparsify_(by_plan, plan)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    reference = load_model(dense, device="cpu", dtype="float32")
    models, ids = (made, loaded, by_plan, again, reference), _tokens(14)
    caches = [DynamicCache(config=model.config) for model in models]
    prefill = [model(ids[:, :8], past_key_values=cache).logits for model, cache in zip(models, caches, strict=True)]
    assert all(torch.equal(found, prefill[-1]) for found in prefill)
    layers = sparse_layers(made)
    masks = {name: layer.threshold for name, layer in layers.items() if isinstance(layer.rule, Threshold)}
    MaskedReference(reference, masks)
    counts = []
    for token in ids[:, 8:].split(1, dim=1):
        steps = []
        for model, cache in zip(models, caches, strict=True):
            if model is reference:
                steps.append(model(token, past_key_values=cache).logits)
                continue
            with control_of(model).counting() as counter:
                steps.append(model(token, past_key_values=cache).logits)
            counts.append(counter.by_projection())
        assert all(torch.equal(steps[0], step) for step in steps[1:4])
        assert float((steps[0] - steps[4]).norm() / steps[4].norm()) < 1e-4
    for model in models[:4]:
        assert isinstance(model.model.layers[0].mlp, GateFirstMLP)
        assert model.model.layers[1].mlp.down_proj.rule == Zeros(None)
        assert not isinstance(model.model.layers[1].mlp.gate_proj, SparseLinear)
    assert all(count == counts[0] for count in counts[1:4])
    assert counts[0]["model.layers.0.self_attn.q_proj"] > 0.2
    assert counts[0]["model.layers.1.mlp.down_proj"] > 0.2


def test_gate_and_up_that_a_plan_names_stay_layers(tmp_path: Path) -> None:
    """Then only the zeros before down are skipped."""
    folder = save_kind(tmp_path / "dense", "relu")
    model = load_model(folder, device="cpu", dtype="float32")
    plan = make_plan(calibrate_tiny(folder), 0.5, "uniform")
    mixed = {name: Zeros() if name.endswith("down_proj") else rule for name, rule in plan.projections.items()}
    sparsify_(model, SparsityPlan("by hand", 0.5, mixed))
    assert not any(isinstance(module, GateFirstMLP) for module in model.modules())
    assert set(sparse_layers(model)) == set(mixed)


def test_an_allocation_file_has_no_line_for_zeros() -> None:
    assert "c:" not in PLAN.allocation_yaml()
    assert "b: 0.4" in PLAN.allocation_yaml()


def test_an_export_without_zeros_is_version_1(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "dense")
    calibration = calibrate_tiny(folder)
    write_checkpoint(folder, make_plan(calibration, 0.5, "uniform"), calibration, tmp_path / "out", "link")
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert stored["version"] == 1
    assert all(set(entry) == {"sparsity", "threshold"} for entry in stored["projections"].values())
