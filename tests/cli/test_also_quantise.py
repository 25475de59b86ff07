"""One table over several kinds of weights: bench and eval with --also-quantise."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import save_tiny

from teal_cli.cli import run

KINDS = ["", "int8-output", "int4-32-output"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "tiny")


def _run(verb: str, model: Path, corpus: Path, *arguments: str) -> dict[str, Any]:
    Path("c.yaml").write_text(
        f"calibrate: {{dataset: {corpus}, tokens: 512, seq_len: 64, sensitivity_tokens: 128, quantise_tokens: 128}}\n"
    )
    shared = ["--config", "c.yaml", "--model", str(model), "--device", "cpu", "--also-quantise", "int8,int4:32"]
    assert run([verb, *shared, "--quantise-output", "--json", "r.json", *arguments]) == 0
    content: dict[str, Any] = json.loads(Path("r.json").read_text())
    return content


def test_eval(model: Path, corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = ["--text", str(corpus), "--tokens", "256", "--seq-len", "64", "--sparsity", "0.3,0.5"]
    runs = _run("eval", model, corpus, *text)["runs"]
    assert [entry["quantization"] for entry in runs] == [kind for kind in KINDS for _ in range(2)]
    plain = runs[0]["dense"]["perplexity"]
    for entry in runs:
        assert entry["over_first_dense"] == pytest.approx(entry["sparse"]["perplexity"] / plain)
    sizes = [entry["dense"]["bytes_per_token"] for entry in runs[::2]]
    assert sizes[0] > sizes[1] > sizes[2]
    assert runs[2]["dense"]["perplexity"] != plain
    table = capsys.readouterr().out
    assert "over first dense" in table
    assert all(name in table for name in ("as they are", "int8-output", "int4-32-output"))
    assert {path.name for path in Path("runs").iterdir()} == {"tiny", "tiny-int8-output", "tiny-int4-32-output"}


def test_bench(model: Path, corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    decoding = ["--sparsity", "0.5", "--prompt-tokens", "8", "--new-tokens", "4", "--repeats", "1"]
    runs = _run("bench", model, corpus, *decoding)["runs"]
    assert [entry["quantization"] for entry in runs] == [kind for kind in KINDS for _ in range(2)]
    assert [entry["sparsity"] for entry in runs] == [0.0, 0.5] * 3
    dense = runs[0]["tokens_per_second"]["median"]
    for entry in runs:
        assert entry["speedup"] == pytest.approx(entry["tokens_per_second"]["median"] / dense)
    assert runs[0]["bytes_per_token"] > runs[2]["bytes_per_token"] > runs[4]["bytes_per_token"]
    assert "int4-32-output" in capsys.readouterr().out
    # A report takes each kind of weights for a model of its own.
    Path("r.json").rename("runs/tiny/also.json")
    assert run(["report", "runs/tiny"]) == 0
    page = Path("runs/tiny/report.html").read_text()
    assert "tiny-int4-32-output" in page


def test_all_kinds_of_weights_read_one_text(model: Path, corpus: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(corpus.read_text()[::-1])
    small = ["--model", str(model), "--device", "cpu", "--tokens", "256", "--seq-len", "64"]
    assert run(["calibrate", *small, "--dataset", str(other)]) == 0
    assert run(["calibrate", *small, "--dataset", str(corpus), "--quantise", "int8"]) == 0
    assert run(["eval", *small, "--text", str(corpus), "--also-quantise", "int8", "--json", "r.json"]) == 0
    result = json.loads(Path("r.json").read_text())
    assert result["half"] == "evaluation"  # what int8 was not calibrated on
    plain, quantised = (entry["dense"]["perplexity"] for entry in result["runs"])
    assert quantised == pytest.approx(plain, rel=0.02)


def test_the_output_layer_takes_part_in_all_or_none(model: Path, corpus: Path) -> None:
    small = ["--model", str(model), "--device", "cpu", "--tokens", "256", "--seq-len", "64"]
    assert run(["calibrate", *small, "--dataset", str(corpus), "--no-output-layer"]) == 0
    assert run(["eval", *small, "--text", str(corpus), "--also-quantise", "int8", "--json", "r.json"]) == 0
    result = json.loads(Path("r.json").read_text())
    assert len(result["runs"]) == 2
    assert all("lm_head" not in entry["realised_by_projection"] for entry in result["runs"])


def test_in_a_recipe(model: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("r.yaml").write_text(
        f"model: {model}\ndevice: cpu\nstages: [calibrate, export, eval]\n"
        f"calibrate: {{dataset: {corpus}, tokens: 512, seq_len: 64, sensitivity_tokens: 64}}\n"
        f"eval: {{dataset: {corpus}, tokens: 256, seq_len: 64, also_quantise: int8}}\n"
    )
    assert run(["run", "r.yaml", "--json", "r.json"]) == 0
    made = json.loads(Path("runs/tiny-int8/calibration.json").read_text())
    assert (made["dataset"], made["tokens"], made["seq_len"]) == (str(corpus), 512, 64)
    dense = json.loads(Path("r.json").read_text())["eval"]["runs"][0]["dense"]
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "0 (dense)" in line]
    assert f"{dense['perplexity']:.2f}" in row


@pytest.mark.parametrize(("family", "code"), [("bert", 2), ("gpt2", 3)])
def test_what_cannot_be_is_said_before_anything_is_measured(
    family: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny(tmp_path / family, family)
    size = ["--tokens", "64", "--seq-len", "32"]
    assert run(["eval", "--model", str(folder), "--device", "cpu", "--also-quantise", "int8", *size]) == code
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "--also-quantise", "int8", "--kernels"], "kernels (flag --kernels) is of one kind of weights"),
        (["eval", "--also-quantise", "int8", "--calibration", "."], "calibration (flag --calibration) is of one kind"),
        (["eval", "--also-quantise", "int8", "--mode", "intrinsic"], "leave out also_quantise (flag --also-quantise)"),
        (["bench", "--also-quantise", "int3"], "int3"),
    ],
)
def test_what_does_not_go_together(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    assert message in capsys.readouterr().err
