"""Reports of models that are no Llama: other names, two stacks, encoders, and sparsity of the model's own."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import save_tiny
from intrinsic_models import save_kind

from teal_cli.cli import run as run_command


def _teal(*arguments: object) -> int:
    return run_command([str(argument) for argument in arguments])


def _chain(model: Path, corpus: Path) -> tuple[str, dict, str]:
    """What `teal report` writes, its JSON, and what `teal inspect` prints, after calibrate, export and eval."""
    data = ("--dataset", corpus, "--tokens", 256, "--seq-len", 64)
    assert _teal("calibrate", "--model", model, *data, "--quiet") == 0
    assert (
        _teal("eval", "--model", model, *data, "--sparsity", 0.5, "--json", f"runs/{model.name}/v.json", "--quiet") == 0
    )
    assert _teal("report", f"runs/{model.name}", "--json", "r.json") == 0
    assert _teal("inspect", f"runs/{model.name}/fisher-0.50", "--json", "i.json") == 0
    return Path(f"runs/{model.name}/report.html").read_text(), json.loads(Path("r.json").read_text()), "i.json"


@pytest.mark.parametrize(
    ("family", "kinds", "labels"),
    [
        ("gpt2", {"c_attn", "attn.c", "c_fc", "mlp.c"}, ["0", "1"]),
        ("mixtral", {"q", "k", "v", "o", "gate_up", "down"}, ["0", "1"]),
        ("t5", {"SelfAttention.q", "EncDecAttention.q", "wi", "wo"}, ["encoder 0", "decoder 1"]),
        ("bert", {"query", "key", "value", "intermediate.dense"}, ["0", "1"]),
    ],
)
def test_families(
    family: str,
    kinds: set[str],
    labels: list[str],
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # a terminal on which no name is cut
    page, result, inspected = _chain(save_tiny(tmp_path / family, family), corpus)
    out = capsys.readouterr().out
    projections = json.loads(Path(inspected).read_text())["projections"]
    assert kinds <= {entry["kind"] for entry in projections}
    places = {(entry["name"].partition(".")[0], entry["layer"], entry["kind"]) for entry in projections}
    assert len(places) == len(projections)
    for label in labels:
        assert f'<th scope="row">{label}</th>' in page
        assert label in out
    measured = json.loads(Path(f"runs/{family}/v.json").read_text())
    plan = measured["runs"][0] if family == "bert" else measured["sparse"]
    assert f"sparsity {plan['realised_sparsity']:.1%} (target 50%)" in result["summary"]["cost"]
    if family == "bert":
        assert f"{plan['cosine']:.3f} ± {plan['cosine_stderr']:.3f}" in result["summary"]["cost"]
        assert "An encoder writes no text" in page
        assert Path("runs/bert/report/similarity-1.svg").is_file()
    else:
        assert "teal bench" in result["summary"]["gain"]


def test_sparsity_of_the_models_own(corpus: Path, tmp_path: Path) -> None:
    """No calibration and no export: the results are all there is."""
    model = save_kind(tmp_path / "relu", "relu", tokenizer=True)
    mode = ("--model", model, "--mode", "intrinsic", "--quiet", "--json")
    texts = ("--text", corpus, "--tokens", 256, "--seq-len", 64, "--generate", "--prompts", 1, "--prompt-tokens", 8)
    assert _teal("eval", *mode, "runs/relu/v.json", *texts, "--new-tokens", 4) == 0
    assert _teal("bench", *mode, "runs/relu/b.json", "--prompt-tokens", 8, "--new-tokens", 3, "--repeats", 1) == 0
    assert _teal("report", "runs/relu", "--json", "r.json") == 0
    summary = json.loads(Path("r.json").read_text())["summary"]
    quality, speed = (json.loads(Path(f"runs/relu/{name}.json").read_text()) for name in ("v", "b"))
    assert "only the zeros that the model makes itself" in summary["what"]
    assert f"({quality['sparse']['neuron_sparsity']:.1%} of the MLP neurons are zero)" in summary["cost"]
    assert f"{speed['runs'][1]['speedup']:.2f} times dense" in summary["gain"]
    page = Path("runs/relu/report.html").read_text()
    assert "There is no calibration here" in page
    assert "<summary>intrinsic (v.json)</summary>" in page
    assert _teal("inspect", "runs/relu") == 0


def test_results_of_other_weights(corpus: Path, tmp_path: Path) -> None:
    """Figures of quantised weights are no plain export's, nor the other way round, wherever their files lie."""
    model = save_tiny(tmp_path / "tiny")
    Path("c.yaml").write_text(f"calibrate: {{dataset: {corpus}, tokens: 256, seq_len: 64, sensitivity_tokens: 64}}\n")
    shared = ("--config", "c.yaml", "--model", model, "--device", "cpu", "--quiet", "--sparsity", 0.5, "--json")
    texts = ("--text", corpus, "--tokens", 256, "--seq-len", 64)
    decoding = ("--prompt-tokens", 8, "--new-tokens", 3, "--repeats", 1)
    plain, quantised = Path("runs/tiny"), Path("runs/tiny-int4-32")
    four = ("--quantise", "int4:32")
    assert _teal("eval", *shared, "plain.json", *texts) == 0
    assert _teal("eval", *shared, plain / "int4.json", *texts, *four) == 0
    assert _teal("bench", *shared, plain / "speed.json", *decoding, *four) == 0
    found = _inspected(plain)
    assert found["exports"][0]["realised_sparsity"] is None
    assert found["summary"]["cost"].startswith("not measured")
    assert found["summary"]["gain"].startswith("not measured")
    kinds = json.loads((plain / "int4.json").read_text())
    (plain / "int4.json").rename(quantised / "eval.json")
    (plain / "speed.json").rename(quantised / "speed.json")
    found = _inspected(quantised)
    assert f"perplexity {kinds['sparse']['perplexity']:.2f} in place of" in found["summary"]["cost"]
    assert "times dense" in found["summary"]["gain"]
    # A report with both draws a line for each, on a plot of its own.
    assert _teal("report", quantised, "--results", "plain.json", "--out", "r.html", "--quiet") == 0
    page = Path("r.html").read_text()
    assert page.count('aria-label="Perplexity over dense') == 2
    assert "realised sparsity, tiny-int4-32 on" in page
    assert "realised sparsity, tiny on" in page
    # One result with both kinds.
    assert _teal("eval", *shared, quantised / "eval.json", *texts, "--also-quantise", "int4:32") == 0
    first, second = json.loads((quantised / "eval.json").read_text())["runs"]
    found = _inspected(quantised)
    assert found["exports"][0]["realised_sparsity"] == second["sparse"]["realised_sparsity"]
    assert first["sparse"]["realised_sparsity"] != second["sparse"]["realised_sparsity"]
    assert f"perplexity {second['sparse']['perplexity']:.2f} in place of" in found["summary"]["cost"]
    # Measured by its own name, an export is quantised without a flag.
    (quantised / "eval.json").unlink()
    own = ("--model", quantised / "fisher-0.50", "--device", "cpu", "--quiet")
    assert _teal("eval", *own, *texts, "--json", quantised / "own.json") == 0
    assert _inspected(quantised)["exports"][0]["realised_from"] == str(quantised / "own.json")


def _inspected(folder: Path) -> dict:
    assert _teal("inspect", folder, "--json", "i.json", "--quiet") == 0
    found: dict = json.loads(Path("i.json").read_text())
    return found


def test_an_encoder_says_its_weights(corpus: Path, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "bert", "bert")
    Path("c.yaml").write_text(f"calibrate: {{dataset: {corpus}, tokens: 256, seq_len: 64, sensitivity_tokens: 64}}\n")
    run = Path("runs/bert-int8")
    flags = ("--config", "c.yaml", "--model", model, "--device", "cpu", "--quiet", "--quantise", "int8")
    texts = ("--text", corpus, "--tokens", 256, "--seq-len", 64, "--json", "e.json")
    assert _teal("eval", *flags, *texts) == 0
    assert json.loads(Path("e.json").read_text())["quantization"] == "int8"
    shutil.copy("e.json", run)
    assert _inspected(run)["exports"][0]["realised_from"] == str(run / "e.json")
