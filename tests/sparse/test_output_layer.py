"""An output layer that drops inputs: with tied weights and without, where it sees some positions only."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCABULARY, MaskedReference, calibrate_tiny, export_tiny, save_tiny
from kernel_cases import relative_error
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

import teal_cli.hf
from teal_cli.allocation import make_plan
from teal_cli.bench.decode import weight_bytes_per_token
from teal_cli.checkpoint.calibration import Calibration
from teal_cli.cli import run
from teal_cli.decode.engine import Engine
from teal_cli.decode.paths.fused import FusedPath
from teal_cli.errors import UsageError
from teal_cli.model_loading import load_model
from teal_cli.models.architectures import OUTPUT_SITE, block_weights, find_projections
from teal_cli.sparse import SparseLinear, control_of, recalibrate_, sparse_layers, sparsify_
from teal_cli.sparse.replace import set_thresholds_

assert teal_cli.hf
PROMPT, LENGTH = 20, 40


def _tokens(rows: int = 1) -> Tensor:
    return torch.randint(2, VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["llama", "llama-bias"], ids=["untied", "tied"])
def dense(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "dense", request.param)


@pytest.fixture
def calibration(dense: Path) -> Calibration:
    return calibrate_tiny(dense, output_layer=True)


@pytest.fixture
def exported(dense: Path, tmp_path: Path) -> Path:
    return export_tiny(dense, tmp_path / "sparse", allocation="fisher", output_layer=True)[0]


def test_it_is_one_more_projection(dense: Path, calibration: Calibration) -> None:
    model = AutoModelForCausalLM.from_pretrained(dense)
    *others, output = find_projections(model, output_layer=True)
    assert others == find_projections(model)
    assert (output.name, output.site, output.out_features) == ("lm_head", OUTPUT_SITE, VOCABULARY)
    positions = calibration.info.tokens - 4 * calibration.info.tokens // calibration.info.seq_len
    assert int(calibration.histograms[OUTPUT_SITE].sum()) == positions * output.in_features
    assert float(calibration.sensitivities["lm_head"][-1]) > 0.0


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3])
def test_decode_equals_eager_masked_maths(dense: Path, exported: Path, rows: int) -> None:
    """Through transformers alone, whose prefill asks for the logits of its last position only."""
    plain = AutoModelForCausalLM.from_pretrained(dense)
    sparse = AutoModelForCausalLM.from_pretrained(exported)
    assert isinstance(sparse.lm_head, SparseLinear)
    assert (sparse.lm_head.weight is sparse.get_input_embeddings().weight) == plain.config.tie_word_embeddings
    ids = _tokens(rows)
    caches = DynamicCache(config=plain.config), DynamicCache(config=sparse.config)
    one = {"logits_to_keep": 1}
    expected = plain(input_ids=ids[:, :PROMPT], past_key_values=caches[0], **one).logits
    got = sparse(input_ids=ids[:, :PROMPT], past_key_values=caches[1], **one).logits
    assert relative_error(got, expected) < 1e-5  # dense
    reference = MaskedReference(plain, {name: layer.threshold for name, layer in sparse_layers(sparse).items()})
    compared = 0
    for position in range(PROMPT, LENGTH):
        token = ids[:, position : position + 1]
        expected = plain(input_ids=token, past_key_values=caches[0]).logits
        got = sparse(input_ids=token, past_key_values=caches[1]).logits
        if not reference.decided:
            break
        assert relative_error(got, expected) < 1e-4
        compared += 1
    assert compared >= 3


@torch.no_grad()
@pytest.mark.parametrize("keep", [1, LENGTH - PROMPT, LENGTH - PROMPT + 5, 0])
def test_masked_positions_are_those_behind_the_prefix(exported: Path, keep: int) -> None:
    """However many of the last positions the output layer is asked for (0: all)."""
    model = AutoModelForCausalLM.from_pretrained(exported)
    control, ids = control_of(model), _tokens()
    with control.masked(PROMPT):
        everything = model(input_ids=ids).logits
        with control.counting() as counter:
            kept = model(input_ids=ids, logits_to_keep=keep).logits
    torch.testing.assert_close(kept, everything[:, -keep:], rtol=1e-4, atol=1e-5)
    seen = counter._tallies["lm_head"].seen
    assert seen == min(keep or LENGTH, LENGTH - PROMPT) * model.config.hidden_size
    with control.dense():
        dense = model(input_ids=ids).logits
    head = everything[:, :PROMPT]
    torch.testing.assert_close(head, dense[:, :PROMPT], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(everything[:, PROMPT:], dense[:, PROMPT:], rtol=1e-2)


@torch.no_grad()
def test_engine_prefills_dense_and_counts(dense: Path, exported: Path) -> None:
    model = load_model(exported, device="cpu", dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(dense)
    control = control_of(model)
    engine, ids = Engine(model), _tokens()
    for prompt in (ids[:, :PROMPT], ids[:, :1]):
        expected = plain(input_ids=prompt).logits[:, -1]
        assert relative_error(engine.prefill(prompt, engine.new_cache(LENGTH)), expected) < 1e-5
    cache = engine.new_cache(LENGTH)
    with control.counting() as counter:
        engine.prefill(ids[:, :PROMPT], cache)
        engine.step(ids[:, PROMPT : PROMPT + 1], cache)
    realised = counter.by_projection()
    assert 0.2 < realised["lm_head"] < 0.8
    saved = weight_bytes_per_token(model, {}) - weight_bytes_per_token(model, {"lm_head": 0.5})
    assert saved == model.lm_head.weight.nbytes // 2


def test_saved_again_it_is_the_same(dense: Path, exported: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(exported)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    plain = AutoModelForCausalLM.from_pretrained(dense)
    assert torch.equal(again.lm_head.weight, plain.lm_head.weight)
    assert torch.equal(again.get_input_embeddings().weight, plain.get_input_embeddings().weight)
    assert again.lm_head.rule == model.lm_head.rule


def test_thresholds_that_hold(dense: Path, calibration: Calibration) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(dense)
    plan = make_plan(calibration, 0.5, "fisher")
    sparsify_(model, plan)
    text = torch.randint(2, VOCABULARY, (8, 64), generator=torch.Generator().manual_seed(9))
    held = recalibrate_(model, plan, text, dense_prefix=32)
    control = control_of(model)
    with control.masked(32), control.counting() as counter, torch.no_grad():
        model(input_ids=text)
    assert counter.by_projection()["lm_head"] == pytest.approx(held.projections["lm_head"].expected_sparsity, abs=0.01)
    assert counter.model_wide() == pytest.approx(0.5, abs=0.01)


def test_a_sparsity_is_the_same_bytes_with_it_and_without(dense: Path, calibration: Calibration) -> None:
    """It saves elsewhere what the blocks then need not; its own weights are not part of what the sparsity is of."""
    model = AutoModelForCausalLM.from_pretrained(dense)
    total = block_weights(find_projections(model))
    sizes = {projection.name: projection.parameters for projection in calibration.projections}
    assert total == sum(sizes.values()) - sizes["lm_head"]
    for allocation in ("fisher", "fisher-site"):
        with_it = make_plan(calibration, 0.5, allocation).projections
        without = make_plan(calibrate_tiny(dense), 0.5, allocation).projections
        assert with_it["lm_head"].expected_sparsity > 0.05
        assert "lm_head" not in without
        for plan in (with_it, without):
            saved = sum(entry.expected_sparsity * sizes[name] for name, entry in plan.items())
            assert saved == pytest.approx(0.5 * total, rel=1e-6)


def test_thresholds_are_of_what_it_is_given(dense: Path, calibration: Calibration) -> None:
    """Some models scale the last hidden state on its way (MiniCPM): not what the last block wrote counts."""
    model: Any = AutoModelForCausalLM.from_pretrained(dense)
    plan = make_plan(calibration, 0.5, "fisher")
    sparsify_(model, plan)
    model.lm_head.register_forward_pre_hook(lambda module, args: (0.1 * args[0],))
    text = torch.randint(2, VOCABULARY, (8, 64), generator=torch.Generator().manual_seed(9))
    recalibrate_(model, plan, text, dense_prefix=32)
    control = control_of(model)
    with control.masked(32), control.counting() as counter, torch.no_grad():
        model(input_ids=text)
    assert counter.by_projection()["lm_head"] == pytest.approx(plan.projections["lm_head"].expected_sparsity, abs=0.01)


@torch.no_grad()
def test_called_by_itself_on_several_positions_it_is_dense(exported: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(exported)
    cache = DynamicCache(config=model.config)
    model(input_ids=_tokens()[:, :PROMPT], past_key_values=cache)
    model(input_ids=_tokens()[:, PROMPT : PROMPT + 1], past_key_values=cache)
    hidden = torch.randn(1, 5, model.config.hidden_size)
    torch.testing.assert_close(model.lm_head(hidden), hidden @ model.lm_head.weight.t(), rtol=1e-5, atol=1e-5)


def test_limits_reach_it_by_name_only(calibration: Calibration) -> None:
    bounded = make_plan(calibration, 0.5, "fisher", limits={"*": (0.49, 0.5)}).projections  # of it, next to nothing
    assert all(
        0.49 - 1e-9 <= entry.expected_sparsity <= 0.5 + 1e-9 for name, entry in bounded.items() if name != "lm_head"
    )
    assert bounded["lm_head"].expected_sparsity < 0.2
    dense = make_plan(calibration, 0.5, "fisher", limits={"lm_head": (0.0, 0.0)}).projections
    assert dense["lm_head"].expected_sparsity == 0.0


def test_the_papers_allocations_leave_it_dense(calibration: Calibration) -> None:
    uniform = make_plan(calibration, 0.5, "uniform").projections
    assert uniform["lm_head"].expected_sparsity == 0.0
    assert {entry.expected_sparsity for name, entry in uniform.items() if name != "lm_head"} == {0.5}
    with pytest.raises(UsageError, match="--greedy-tokens"):
        make_plan(calibration, 0.5, "greedy")
    block = torch.linspace(0, 0.9, 10).unsqueeze(1).repeat(1, 7)
    calibration.paths = {"model.layers.0": block, "model.layers.1": block}
    plan = make_plan(calibration, 0.5, "greedy")
    assert plan.projections["lm_head"].expected_sparsity == 0.0
    assert len(plan.projections) == len(calibration.projections)


def test_a_dense_one_is_left_where_it_lies(dense: Path, calibration: Calibration) -> None:
    """It may be the embedding too; a plan that drops some of its inputs lays it out."""
    model = load_model(dense, device="cpu", dtype="float32")
    control = sparsify_(model, make_plan(calibration, 0.5, "uniform"))
    assert model.lm_head.weight.is_contiguous()
    assert FusedPath.unsupported(model, control) is None
    assert FusedPath(model, control).output() is None
    set_thresholds_(model, make_plan(calibration, 0.5, "fisher-site"))
    assert model.lm_head.weight.is_contiguous()
    assert FusedPath.unsupported(model, control) is None
    assert FusedPath(model, control).output() is not None
    assert model.lm_head.weight.t().is_contiguous()


def test_times_without_it_leave_it_dense(calibration: Calibration, tmp_path: Path) -> None:
    shapes = {(p.out_features, p.in_features) for p in calibration.projections if not p.is_output}
    table = tmp_path / "kernels.json"
    entries = [
        {"out_features": out, "in_features": n, "realised_sparsity": s, "microseconds": {"median": 10 - 8 * s}}
        for out, n in shapes
        for s in (0.0, 0.5)
    ]
    table.write_text(json.dumps({"kernels": entries}))
    plan = make_plan(calibration, 0.5, "fisher", cost=table)
    assert plan.projections["lm_head"].expected_sparsity == 0.0


def test_from_the_command_line(dense: Path, corpus: Path) -> None:
    text = ["--dataset", str(corpus), "--seq-len", "64", "--quiet"]
    calibrate = ["calibrate", "--model", str(dense), "--tokens", "1024", *text]
    measured = [*text, "--sparsity", "0.4", "--allocation", "uniform,fisher", "--json", "eval.json"]
    assert run([*calibrate, "--no-output-layer"]) == 0
    assert run(["eval", "--model", str(dense), "--tokens", "512", *measured]) == 0
    assert "lm_head" not in Path("eval.json").read_text()
    assert run(calibrate) == 0  # by default
    assert run(["eval", "--model", str(dense), "--tokens", "512", *measured]) == 0
    runs = json.loads(Path("eval.json").read_text())["runs"]
    dropped = [entry["realised_by_projection"]["lm_head"] for entry in runs]
    assert dropped[0] == 0.0 < dropped[1]
    uniform, fisher = (entry["sparse"] for entry in runs)
    assert fisher["realised_sparsity"] == pytest.approx(uniform["realised_sparsity"], abs=0.05)
    assert fisher["bytes_per_token"] == pytest.approx(uniform["bytes_per_token"], rel=0.05)
    bench = ["bench", "--model", str(dense), "--sparsity", "0.4", "--new-tokens", "4", "--repeats", "1", "--quiet"]
    assert run(bench) == 0
