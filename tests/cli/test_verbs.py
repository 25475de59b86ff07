"""Every verb on a tiny model, through the command line."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from command_line import calibrate_on, calibrate_once, copied
from conftest import export_tiny, save_tiny
from safetensors import safe_open

from teal_cli.checkpoint import calibration as calibration_file
from teal_cli.cli import VERBS, run
from teal_cli.config import VERB_CONFIGS, CalibrateConfig
from teal_cli.console import Reporter
from teal_cli.steps.positions import require_fit
from teal_cli.workspace import Workspace


def _teal(*arguments: object) -> int:
    return run([str(argument) for argument in arguments])


def _json(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "tiny", chat=True)


@pytest.fixture(scope="module")
def calibrated_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrate_once(tmp_path_factory.mktemp("calibrated"), chat=True)


@pytest.fixture
def calibrated(calibrated_home: Path, tmp_path: Path) -> Path:
    return copied(calibrated_home, tmp_path)


def test_the_chain(dense: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calibrate_on(corpus, dense)
    assert _teal("export", "--model", dense, "--sparsity", 0.4, "--json", "e.json") == 0
    exported = Path(_json(Path("e.json"))["folder"])
    assert exported == Path("runs/tiny/fisher-0.40")
    capsys.readouterr()
    assert (
        _teal("eval", "--model", exported, "--text", corpus, "--tokens", 256, "--seq-len", 64, "--json", "v.json") == 0
    )
    assert "realised sparsity" in capsys.readouterr().out
    result = _json(Path("v.json"))
    assert result["sparse"]["target_sparsity"] == 0.4
    assert result["sparse"]["realised_sparsity"] == pytest.approx(0.4, abs=0.05)
    assert result["half"] == "evaluation"


def test_calibrate_says_what_it_did(dense: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _teal("calibrate", "--model", dense, "--dataset", corpus, "--tokens", 512, "--seq-len", 64) == 0
    captured = capsys.readouterr()
    assert "9 hidden states feeding 15 projections" in captured.out
    assert "next: teal export" in captured.err


def test_missing_stages_are_said_and_made(dense: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("c.yaml").write_text(f"model: {dense}\nsparsity: 0.5\n")
    # sotu is the default text; a tiny tokenizer makes many tokens of it, of which few are read.
    assert _teal("generate", "--config", "c.yaml", "--prompt", "the stars", "--max-new-tokens", 4) == 0
    said = capsys.readouterr().err
    assert "no calibration of tiny" in said
    assert "no export of tiny at sparsity 0.5" in said
    assert Path("runs/tiny/fisher-0.50/teal.json").is_file()
    assert _teal("generate", "--config", "c.yaml", "--prompt", "the stars", "--max-new-tokens", 4) == 0
    assert "no calibration" not in capsys.readouterr().err


def test_a_calibration_that_nobody_described_fits_a_table_of_positions(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A flag of another verb would not change its length."""
    model = save_tiny(tmp_path / "gpt2", "gpt2")
    own = CalibrateConfig(model=str(model))
    require_fit(own, Workspace.of(own, Reporter(quiet=True)))  # of a recipe's stage
    assert _teal("calibrate", "--model", model, "--dataset", corpus, "--tokens", 2048) == 0, capsys.readouterr().err
    assert calibration_file.load(Path("runs/gpt2")).info.seq_len == 256
    shutil.rmtree("runs")
    size = ("--tokens", 512, "--seq-len", 64, "--batch-size", 4, "--held-out-tokens", 64)
    assert _teal("adapt", "--model", model, "--dataset", corpus, *size) == 0, capsys.readouterr().err
    assert calibration_file.load(Path("runs/gpt2")).info.seq_len == 256


def test_a_new_calibration_makes_exports_anew(
    calibrated: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _teal("export", "--model", calibrated) == 0
    before = _json(Path("runs/tiny/fisher-0.50/teal.json"))
    assert _teal("calibrate", "--model", calibrated, "--dataset", corpus, "--tokens", 256, "--seq-len", 64) == 0
    capsys.readouterr()
    assert _teal("generate", "--model", calibrated, "--prompt", "stars", "--max-new-tokens", 2) == 0
    assert "exporting it" in capsys.readouterr().err
    assert _json(Path("runs/tiny/fisher-0.50/teal.json")) != before


def test_generate(calibrated: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--model", calibrated, "--max-new-tokens", 12, "--temperature", 1, "--seed", 3)
    assert _teal("generate", *flags, "--prompt", "the stars", "--json", "g.json") == 0
    first = capsys.readouterr()
    result = _json(Path("g.json"))
    assert first.out == result["text"] + "\n"
    assert "tokens/s" in first.err
    assert "realised sparsity 0." in first.err
    assert result["chat"] is True
    monkeypatch.setattr(sys, "stdin", io.StringIO("the stars"))
    assert _teal("generate", *flags, "--prompt", "-") == 0
    assert capsys.readouterr().out == first.out
    assert _teal("generate", *flags, "--prompt", "the stars", "--no-chat") == 0
    assert capsys.readouterr().out != first.out
    assert _teal("generate", *flags, "--prompt", "the stars", "--sparsity", 0) == 0
    assert "dense" in capsys.readouterr().err
    dense = _json(Path("g.json"))
    exported = "runs/tiny/fisher-0.50"
    assert (
        _teal(
            "generate", "--model", exported, "--prompt", "a", "--sparsity", 0, "--max-new-tokens", 3, "--json", "g.json"
        )
        == 0
    )
    assert dense["target_sparsity"] == 0.5
    assert (_json(Path("g.json"))["target_sparsity"], _json(Path("g.json"))["realised_sparsity"]) == (0.0, None)


def test_missing_calibration_is_made_as_the_yaml_says(dense: Path, corpus: Path) -> None:
    Path("c.yaml").write_text(f"model: {dense}\ncalibrate: {{dataset: {corpus}, tokens: 256, seq_len: 64}}\n")
    assert _teal("generate", "--config", "c.yaml", "--prompt", "a", "--max-new-tokens", 2) == 0
    assert _json(Path("runs/tiny/calibration.json"))["tokens"] == 256


def test_bench(calibrated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--prompt-tokens", 8, "--new-tokens", 4, "--repeats", 2, "--json", "b.json")
    assert _teal("bench", "--model", calibrated, "--sparsity", "0.3,0.6", "--kernels", *flags) == 0
    assert "tokens/s" in capsys.readouterr().out
    result = _json(Path("b.json"))
    assert {"device", "dtype", "versions", "runs", "kernels"} <= set(result)
    assert [run["backend"] for run in result["runs"]] == ["dense", "cpu", "cpu"]
    assert [run["sparsity"] for run in result["runs"]] == [0.0, 0.3, 0.6]
    dense, *sparse = result["runs"]
    assert dense["speedup"] == 1.0
    for entry in sparse:
        assert entry["realised_sparsity"] == pytest.approx(entry["sparsity"], abs=0.1)
        assert entry["bytes_per_token"] < dense["bytes_per_token"]
        speed = entry["tokens_per_second"]
        assert speed["min"] <= speed["median"] <= speed["max"]
        assert entry["speedup"] == pytest.approx(speed["median"] / dense["tokens_per_second"]["median"])
        assert entry["bandwidth_gb_s"] == pytest.approx(entry["bytes_per_token"] * speed["median"] / 1e9)
    shapes = {(run["out_features"], run["in_features"]) for run in result["kernels"]}
    assert shapes == {(64, 64), (32, 64), (100, 64), (64, 100), (300, 64)}


def test_bench_of_a_batch(calibrated: Path) -> None:
    flags = ["--prompt-tokens", "8", "--new-tokens", "3", "--repeats", "1", "--batch", "3", "--json", "b.json"]
    assert _teal("bench", "--model", calibrated, "--sparsity", "0.5", *flags) == 0
    result = _json(Path("b.json"))
    assert (result["batch"], result["path"] == "native") == (3, result["general_because"] is None)
    # Rows share what they read, so bytes a token are not said.
    assert [run["bytes_per_token"] for run in result["runs"]] == [None, None]
    assert result["runs"][1]["realised_sparsity"] == pytest.approx(0.5, abs=0.15)
    assert _teal("bench", "--model", calibrated, "--batch", "9") == 2


@pytest.mark.parametrize("more", ["model_type: llama", "model_type: mixtral, num_local_experts: 4"])
def test_bench_with_random_weights(more: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path("configs/models")
    folder.mkdir(parents=True)
    shape = (
        f"{{{more}, vocab_size: 500, hidden_size: 64, intermediate_size: 96, num_hidden_layers: 2, "
        "num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 256}"
    )
    (folder / "small.yaml").write_text(f"hub_id: nobody/small\nshape: {shape}\n")
    flags = ("--prompt-tokens", 8, "--new-tokens", 4, "--repeats", 1, "--json", "b.json")
    assert _teal("bench", "--model", "small", "--random-weights", "--sparsity", "0,0.5", *flags) == 0
    result = _json(Path("b.json"))
    assert [run["sparsity"] for run in result["runs"]] == [0.0, 0.5]
    assert result["runs"][1]["realised_sparsity"] == pytest.approx(0.5, abs=0.05)
    assert result["random_weights"] is True
    assert not Path("runs").exists()


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert _teal("info", "--json", "i.json") == 0
    assert "llama-3-8b" in capsys.readouterr().out
    result = _json(Path("i.json"))
    assert result["backends"]["cpu"] == "available"
    assert result["aliases"]["smollm2-135m"]["hub_id"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "qwen3" in result["architectures"]


def _recipe(dense: Path, corpus: Path) -> Path:
    path = Path("recipe.yaml")
    path.write_text(
        f"model: {dense}\nsparsity: 0.5\ndataset: {corpus}\nseq_len: 64\ntokens: 256\n"
        "bench: {new_tokens: 3, prompt_tokens: 8, repeats: 1}\ngenerate: {prompt: the stars, max_new_tokens: 4}\n"
    )
    return path


def test_run_ends_in_the_table_and_a_sample(dense: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _teal("run", _recipe(dense, corpus), "--json", "r.json") == 0
    out, said = capsys.readouterr()
    assert "next: teal generate --model runs/tiny/fisher-0.50" in said
    assert "Dense against sparse" in out
    assert "> the stars" in out
    assert "teal report runs/tiny" in said
    assert list(_json(Path("r.json"))) == ["calibrate", "export", "eval", "bench", "generate"]


@pytest.mark.parametrize(
    ("verb", "said"),
    [
        ("calibrate", "teal: interrupted\n"),
        ("adapt", "teal: interrupted; the same command goes on from its last checkpoint, if it has written one\n"),
        ("run", "teal: interrupted; finished stages are kept\n"),
    ],
)
def test_what_is_said_to_be_kept_is_kept(
    verb: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teal_cli.cli._parse", lambda arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run([verb, "--model", "x"]) == 130
    assert capsys.readouterr().err == said


def test_run_resumes_after_an_interruption(
    dense: Path, corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = _recipe(dense, corpus)
    with monkeypatch.context() as patch:
        patch.setattr("teal_cli.steps.run.evaluate", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        assert _teal("run", recipe) == 130
    assert "interrupted; finished stages are kept" in capsys.readouterr().err
    assert set(_json(Path("runs/tiny/run.json"))) == {"calibrate", "export"}
    with monkeypatch.context() as patch:
        patch.setattr("teal_cli.steps.run.calibrate", lambda *a: pytest.fail("calibrated again"))
        assert _teal("run", recipe) == 0
    said = capsys.readouterr().err
    assert "[1/5] calibrate: done before, kept" in said
    assert "[2/5] export: done before, kept" in said
    assert "[3/5] eval\n" in said


def test_run_repeats_what_changed_or_was_lost(dense: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = _recipe(dense, corpus)
    assert _teal("run", recipe) == 0
    capsys.readouterr()
    assert _teal("run", recipe) == 0
    assert capsys.readouterr().err.count("done before, kept") == 5
    tensors = Path("runs/tiny/calibration.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-1])
    assert _teal("run", recipe) == 0
    assert "[1/5] calibrate\n" in capsys.readouterr().err
    recipe.write_text(recipe.read_text().replace("sparsity: 0.5", "sparsity: 0.3"))
    assert _teal("run", recipe) == 0
    said = capsys.readouterr().err
    assert "calibrate: done before" in said
    assert "export: done before" not in said


def test_quiet_says_nothing(calibrated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert _teal("export", "--model", calibrated, "--quiet") == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_copied_weights_are_files_of_their_own(calibrated: Path) -> None:
    assert _teal("export", "--model", calibrated, "--weights", "copy", "--out", "copied") == 0
    assert _teal("export", "--model", calibrated, "--weights", "link", "--out", "linked") == 0
    source = calibrated / "model.safetensors"
    assert not Path("copied/model.safetensors").samefile(source)
    assert Path("linked/model.safetensors").samefile(source)
    source.unlink()
    for folder in ("copied", "linked"):
        with safe_open(f"{folder}/model.safetensors", "pt") as file:
            assert len(list(file.keys())) > 10


def test_links_fall_back_to_symbolic(calibrated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    assert _teal("export", "--model", calibrated, "--out", "linked") == 0
    assert Path("linked/model.safetensors").is_symlink()
    assert Path("linked/model.safetensors").samefile(calibrated / "model.safetensors")


def test_every_verb_has_a_configuration() -> None:
    assert set(VERBS) == set(VERB_CONFIGS) | {"run"}


def test_a_teal_checkpoint_keeps_its_sparsity(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = export_tiny(save_tiny(tmp_path / "tiny"), tmp_path / "sparse")
    assert _teal("generate", "--model", out, "--prompt", "stars", "--max-new-tokens", 4, "--sparsity", 0.4) == 2
    assert "was exported at sparsity 0.5, not 0.4" in capsys.readouterr().err
    assert _teal("bench", "--model", out, "--sparsity", 0.4) == 2
    assert _teal("calibrate", "--model", out) == 2
    assert _teal("export", "--model", out) == 2
    capsys.readouterr()
    for verb in (["eval"], ["bench"], ["generate", "--prompt", "stars", "--max-new-tokens", 4]):
        assert _teal(*verb, "--model", out, "--allocation", "uniform") == 2
        assert "allocation (flag --allocation) needs the dense model" in capsys.readouterr().err
    flags = ("--prompt-tokens", 8, "--new-tokens", 2, "--repeats", 1)
    assert _teal("bench", "--model", out, *flags) == 0


def test_eval_of_several_plans(dense: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--model", dense, "--dataset", corpus, "--seq-len", 64)
    assert _teal("calibrate", *flags, "--tokens", 512, "--greedy-tokens", 128) == 0
    assert "greedy paths" in capsys.readouterr().out
    assert _teal("export", "--model", dense, "--sparsity", 0.3, "--allocation", "greedy", "--out", "g") == 0
    mine = Path("mine.yaml")
    mine.write_text(Path("g/allocation.yaml").read_text())
    assert _teal("export", "--model", dense, "--allocation", mine, "--out", "again") == 0  # at its own sparsity
    assert _json(Path("again/teal.json"))["target_sparsity"] == pytest.approx(0.3, abs=1e-3)
    several = ("--sparsity", "0.4,0.6", "--allocation", f"uniform,greedy,fisher,{mine}", "--dense-prefix", "4,32")
    wanted = ("--generate", "--prompts", 2, "--prompt-tokens", 8, "--new-tokens", 6, "--json", "v.json")
    assert _teal("eval", *flags, "--tokens", 256, *several, *wanted) == 0
    captured = capsys.readouterr()
    assert "Greedy continuations" in captured.out
    result = _json(Path("v.json"))
    plans = [(run["sparse"]["allocation"], run["sparse"]["target_sparsity"]) for run in result["runs"][::2]]
    assert plans[:6] == [(name, s) for name in ("uniform", "greedy", "fisher") for s in (0.4, 0.6)]
    assert plans[6] == ("mine.yaml", pytest.approx(0.3, abs=1e-3))
    assert [run["dense_prefix"] for run in result["runs"]] == [4, 32] * 7
    assert [run["tokens"] for run in result["runs"][:2]] == [4 * 59, 4 * 31]
    for entry in result["runs"]:
        assert entry["sparse"]["realised_sparsity"] == pytest.approx(entry["sparse"]["target_sparsity"], abs=0.05)
        assert entry["sparse"]["bytes_per_token"] < result["dense_bytes_per_token"]
        assert entry["generation"]["prompts"] == 2
    assert result["sparse"] == result["runs"][0]["sparse"]
    # Alone, each plan gives what it gave among the others.
    again = ("--sparsity", 0.6, "--allocation", "greedy", "--dense-prefix", 32, "--json", "w.json")
    assert _teal("eval", *flags, "--tokens", 256, *again) == 0
    assert _json(Path("w.json"))["perplexity_ratio"] == pytest.approx(result["runs"][7]["perplexity_ratio"], rel=1e-6)


def test_thresholds_without_the_calibrations_text(
    dense: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Thresholds are the dense network's then, which is said; asked for by name, it is an error."""
    calibrate_on(corpus, dense)
    assert _teal("export", "--model", dense, "--sparsity", 0.4, "--out", "with") == 0
    corpus.rename(corpus.with_suffix(".gone"))
    assert _teal("export", "--model", dense, "--sparsity", 0.4, "--out", "without") == 0
    assert "thresholds of the dense network: " in capsys.readouterr().err
    assert _teal("export", "--model", dense, "--sparsity", 0.4, "--no-recalibrate", "--out", "plain") == 0
    assert _teal("export", "--model", dense, "--sparsity", 0.4, "--recalibrate", "--out", "never") == 3
    assert not Path("never").exists()
    made = {name: _json(Path(name) / "teal.json") for name in ("with", "without", "plain")}
    assert [made[name]["propagated"] for name in ("with", "without", "plain")] == [True, False, False]
    thresholds = {name: [p["threshold"] for p in summary["projections"]] for name, summary in made.items()}
    assert thresholds["without"] == thresholds["plain"] != thresholds["with"]


def test_without_sensitivities_uniform_stands_in(dense: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--model", dense, "--dataset", corpus, "--tokens", 512, "--seq-len", 64, "--sensitivity-tokens", 0)
    assert _teal("calibrate", *flags) == 0
    assert _teal("export", "--model", dense, "--json", "e.json") == 0
    assert "allocation uniform in place of fisher" in capsys.readouterr().err
    assert _json(Path("e.json"))["allocation"] == "uniform"
    assert _teal("export", "--model", dense, "--allocation", "fisher") == 2
    assert "--sensitivity-tokens" in capsys.readouterr().err


def test_thresholds_of_text_that_the_model_wrote(dense: Path) -> None:
    """It is kept with the calibration, since it cannot be read again."""
    flags = ("--model", dense, "--dataset", "self", "--tokens", 128, "--seq-len", 64)
    assert _teal("calibrate", *flags) == 0
    assert _teal("export", "--model", dense, "--recalibrate", "--json", "e.json") == 0
    assert _json(Path("e.json"))["propagated"] is True
