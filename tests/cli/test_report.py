"""`teal report` and `teal inspect` at the command line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import save_tiny, write_corpus

from teal_cli.cli import run


def _teal(*arguments: object) -> int:
    return run([str(argument) for argument in arguments])


def _fails(capsys: pytest.CaptureFixture[str], code: int, message: str, *arguments: object) -> None:
    capsys.readouterr()
    assert _teal(*arguments) == code
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("teal: ")]
    assert message in line


@pytest.fixture
def own_run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return shutil.copytree(finished_run, tmp_path / "runs" / "tiny")


def test_report(own_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _teal("report", own_run, "--json", "r.json") == 0
    page = own_run / "report.html"
    assert capsys.readouterr().out == f"{page}\n"
    result = json.loads(Path("r.json").read_text())
    assert result["page"] == str(page)
    assert all(Path(file).parent == own_run / "report" for file in result["plots"])
    assert all(Path(file).is_file() for file in result["plots"])
    assert set(result["summary"]) == {"what", "cost", "gain"}
    assert _teal("report", own_run / "uniform-0.30", "--quiet") == 0
    assert capsys.readouterr().out == ""
    assert (own_run / "report-uniform-0.30.html").is_file()
    assert (own_run / "report-uniform-0.30" / "quality-1.png").is_file()


def test_report_elsewhere_with_further_results(own_run: Path) -> None:
    for name in ("eval", "bench"):
        (own_run / f"{name}.json").rename(f"{name}.json")
    assert _teal("report", own_run, "--out", "a/b.html", "--plots", "p", "--results", "eval.json,bench.json") == 0
    assert "times dense" in Path("a/b.html").read_text()
    assert Path("p/speed-1.svg").is_file()
    assert not (own_run / "report").exists()


def test_what_no_report_can_be_made_of(own_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _fails(capsys, 3, "there is no folder nowhere", "report", "nowhere")
    Path("empty").mkdir()
    _fails(capsys, 3, "neither a run folder nor a TEAL checkpoint", "report", "empty")
    _fails(capsys, 3, "neither a run folder nor a TEAL checkpoint", "inspect", "empty")
    _fails(capsys, 2, "results (flag --results): there is no such file", "report", own_run, "--results", "x.json")
    Path("x.json").write_text('{"runs": [{"speedup": 2}]}')
    _fails(capsys, 3, "x.json is no result of teal eval, bench or generate", "report", own_run, "--results", "x.json")
    (own_run / "eval.json").write_text("{")
    _fails(capsys, 3, "eval.json", "report", own_run)
    assert not (own_run / "report.html").exists()


def test_thresholds_that_were_altered(own_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = own_run / "fisher-0.50" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["target_sparsity"] = 0.4
    path.write_text(json.dumps(config))
    for verb in ("report", "inspect"):
        _fails(capsys, 3, "were altered: export it again", verb, own_run)


def test_a_report_needs_no_weights(own_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own_run / "fisher-0.50" / "model.safetensors").unlink()
    assert _teal("inspect", own_run / "fisher-0.50", "--json", "i.json") == 0
    assert "has no usable weights" in " ".join(capsys.readouterr().out.split())
    assert "has no usable weights" in json.loads(Path("i.json").read_text())["exports"][0]["problem"]
    assert _teal("report", own_run, "--out", "page") == 0
    assert (Path("page-plots") / "speed-1.svg").is_file()


def test_measures_that_are_no_number(own_run: Path) -> None:
    """JSON has null for infinity: of a model that dropping inputs broke."""
    content = json.loads((own_run / "eval.json").read_text())
    for entry in [content, *content["runs"]]:
        entry["sparse"] |= {"perplexity": None, "kl": None, "stderr": None}
        entry |= {"perplexity_ratio": None, "perplexity_ratio_stderr": None, "over_first_dense": None}
        entry["generation"] |= {"sparse_text_perplexity": None}
        entry["tasks"] = {"words": {side: {"word_perplexity,none": None} for side in ("dense", "sparse")}}
    (own_run / "eval.json").write_text(json.dumps(content))
    assert _teal("report", own_run, "--json", "r.json") == 0
    assert "perplexity nan in place of" in json.loads(Path("r.json").read_text())["summary"]["cost"]
    assert ">nan<" in (own_run / "report.html").read_text()


def test_without_matplotlib(own_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teal_cli.report.drawing.find_spec", lambda name: None)
    _fails(capsys, 4, "needs matplotlib, which is not here: pip install 'teal-cli[report]'", "report", own_run)
    assert _teal("inspect", own_run) == 0


def test_inspect_a_run(own_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _teal("inspect", own_run, "--json", "i.json") == 0
    out = capsys.readouterr().out
    for name in ("fisher-0.50", "uniform-0.30", "eval.json", "bench.json"):
        assert name in out
    result = json.loads(Path("i.json").read_text())
    assert result["kind"] == "run"
    assert [export["name"] for export in result["exports"]] == [
        "fisher-0.30",
        "fisher-0.50",
        "uniform-0.30",
        "uniform-0.50",
    ]
    assert result["calibration"]["sites"] == 9
    assert [entry["verb"] for entry in result["results"]] == ["eval", "bench", "generate"]
    assert result["projections"] == []


def test_inspect_a_checkpoint(own_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = own_run / "fisher-0.50"
    assert _teal("inspect", folder, "--json", "i.json") == 0
    out = capsys.readouterr().out
    assert "recalibrated in the sparse network" in out
    assert "target / realised" in out
    result = json.loads(Path("i.json").read_text())
    summary = json.loads((folder / "teal.json").read_text())
    (export,) = result["exports"]
    assert (result["kind"], export["allocation"], export["target_sparsity"]) == ("checkpoint", "fisher", 0.5)
    assert export["weight_bytes"] == (folder / "model.safetensors").stat().st_size
    assert export["realised_sparsity"] == pytest.approx(0.5, abs=0.05)
    assert result["calibration"]["dataset"] == summary["calibration"]["dataset"]
    named = {entry["name"]: entry for entry in result["projections"]}
    for entry in summary["projections"]:
        assert entry.items() <= named[entry["name"]].items()
    first = named["model.layers.0.self_attn.q_proj"]
    assert (first["layer"], first["kind"]) == (0, "q")
    assert f"{first['threshold']:.3g}" in out


def test_inspect_a_checkpoint_that_transformers_saved_again(own_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(own_run / "fisher-0.50", "again")
    Path(folder, "teal.json").unlink()
    assert _teal("inspect", "again") == 0
    assert "not recorded" in capsys.readouterr().out


def test_output_layer_and_quantised_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A projection outside of the layers has a table of its own; what is absent is made with --quantise."""
    model, corpus = save_tiny(tmp_path / "tiny"), write_corpus(tmp_path / "corpus.txt")
    flags = ("--model", model, "--quantise", "int4:32", "--quiet")
    assert _teal("calibrate", *flags, "--dataset", corpus, "--tokens", 256, "--seq-len", 64, "--output-layer") == 0
    assert _teal("export", *flags, "--allocation", "uniform") == 0
    run = Path("runs/tiny-int4-32")
    capsys.readouterr()
    assert _teal("inspect", run / "uniform-0.50") == 0
    out = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    assert "quantised int4:32" in out
    assert "Outside of the layers" in out
    assert "teal bench --model tiny --quantise int4:32 --sparsity 0.5 --allocation uniform" in out
    assert _teal("report", run) == 0
    assert "output input" in (run / "report.html").read_text()


def test_from_inside_of_a_run(
    own_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (own_run / "bench.json").unlink()
    monkeypatch.chdir(own_run)
    assert _teal("inspect", ".", "--json", "../i.json") == 0
    result = json.loads(Path("../i.json").read_text())
    assert (result["kind"], result["name"]) == ("run", "tiny")
    assert f"--runs {own_run.parent}" in result["summary"]["gain"]
    monkeypatch.chdir(own_run / "uniform-0.50")
    assert _teal("report", ".", "--quiet") == 0
    assert (own_run / "report-uniform-0.50.html").is_file()


def test_a_backend_of_a_notebook_is_no_matter(own_run: Path) -> None:
    """Jupyter hands its own to what it starts; matplotlib refuses one that is not installed."""
    environment = os.environ | {"MPLBACKEND": "module://not_installed.backend_inline"}
    command = [sys.executable, "-m", "teal_cli", "report", str(own_run), "--quiet"]
    assert subprocess.run(command, env=environment, check=False).returncode == 0
