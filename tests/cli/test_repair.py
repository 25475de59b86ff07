"""A recipe makes anew what was damaged since it last ran."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import save_tiny, write_corpus

from teal_cli.cli import run
from teal_cli.errors import ArtefactError


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished recipe: calibrate and export. Not to be changed."""
    home = tmp_path_factory.mktemp("home")
    save_tiny(home / "tiny")
    write_corpus(home / "corpus.txt")
    _recipe(home)
    return home


def _recipe(home: Path) -> None:
    (home / "r.yaml").write_text(
        f"model: {home / 'tiny'}\nstages: [calibrate, export]\nruns: {home / 'runs'}\ndataset: {home / 'corpus.txt'}\n"
        "tokens: 128\nseq_len: 64\nrecalibrate: false\nweights: copy\n"
    )
    assert run(["run", str(home / "r.yaml")]) == 0


def _threshold(folder: Path) -> None:
    config = json.loads((folder / "fisher-0.50/config.json").read_text())
    next(iter(config["quantization_config"]["projections"].values()))["threshold"] *= 2
    (folder / "fisher-0.50/config.json").write_text(json.dumps(config))


def _weights(folder: Path) -> None:
    file = folder / "fisher-0.50/model.safetensors"
    file.write_bytes(file.read_bytes()[:-100] + bytes(100))


_DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "nothing": (lambda folder: None, []),
    "a threshold": (_threshold, ["export"]),
    "weights": (_weights, ["export"]),
    "no teal.json": (lambda folder: (folder / "fisher-0.50/teal.json").unlink(), ["export"]),
    "broken config.json": (lambda folder: (folder / "fisher-0.50/config.json").write_text("{"), ["export"]),
    "another plan": (lambda folder: (folder / "fisher-0.50/config.json").write_text('{"a": 1}'), ["export"]),
    "broken state": (lambda folder: (folder / "run.json").write_text("{"), ["calibrate", "export"]),
    "a list as state": (lambda folder: (folder / "run.json").write_text("[1]"), ["calibrate", "export"]),
    "broken result": (lambda folder: (folder / "export.json").write_text('{"folder": 3}'), ["export"]),
    "tensors": (lambda folder: (folder / "calibration.safetensors").write_bytes(b"x"), ["calibrate"]),
    "a size": (
        lambda folder: (folder / "calibration.json").write_text(
            (folder / "calibration.json").read_text().replace('"out_features": 64', '"out_features": 640', 1)
        ),
        ["calibrate"],
    ),
}


@pytest.mark.parametrize("damage", _DAMAGE)
def test_a_recipe_repairs(damage: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, expected = _DAMAGE[damage]
    plan = json.loads((home / "runs/tiny/fisher-0.50/config.json").read_text())["quantization_config"]
    folder = Path(shutil.copytree(home / "runs", tmp_path / "kept")) / "tiny"
    # The recipe names the folder, so the copy that is damaged lies there, and the whole one elsewhere.
    try:
        change(home / "runs/tiny")
        capsys.readouterr()
        assert run(["run", str(home / "r.yaml")]) == 0
        said = capsys.readouterr().err
        made = [stage for stage in ("calibrate", "export") if f"{stage}: done before" not in said]
        assert made == expected
        config = json.loads((home / "runs/tiny/fisher-0.50/config.json").read_text())
        assert config["quantization_config"] == plan
    finally:
        shutil.rmtree(home / "runs/tiny")
        shutil.copytree(folder, home / "runs/tiny")


def test_a_later_stage_that_misses_its_text_is_said_first(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = (home / "r.yaml").read_text().replace("[calibrate, export]", "[calibrate, eval]")
    Path("r.yaml").write_text(recipe.replace(str(home / "runs"), "here") + "eval:\n  dataset: none.txt\n")
    assert run(["run", "r.yaml"]) == 3
    assert "none.txt" in capsys.readouterr().err
    assert not list(Path("here").rglob("calibration.json"))


def test_figures_of_a_stage_that_ends_early_are_kept(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = (home / "r.yaml").read_text().replace("[calibrate, export]", "[calibrate, export, eval]")
    Path("r.yaml").write_text(
        recipe.replace(str(home / "runs"), "here") + "eval:\n  generate: true\n  prompt_tokens: 8\n  new_tokens: 4\n"
    )

    def fail(*args: object, **options: object) -> None:
        raise ArtefactError("the prompts cannot be written on")

    with monkeypatch.context() as patch:
        patch.setattr("teal_cli.steps.evaluate.agree", fail)
        assert run(["run", "r.yaml"]) == 3
    kept = json.loads(Path("here/tiny/eval.json").read_text())
    assert kept["generation"] is None
    assert run(["run", "r.yaml"]) == 0  # the stage was not finished
    whole = json.loads(Path("here/tiny/eval.json").read_text())
    assert whole["generation"] is not None
    assert whole["sparse"]["perplexity"] == kept["sparse"]["perplexity"]


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_changed_model_folder_is_noticed(home: Path, tmp_path: Path, capsys, name: str) -> None:
    """The weights are the same; hidden states, or the tokens of the text, are not."""
    model = Path(shutil.copytree(home / "tiny", tmp_path / "tiny"))
    recipe = (home / "r.yaml").read_text().replace(str(home / "runs"), "here")
    Path("r.yaml").write_text(recipe.replace(str(home / "tiny"), str(model)))
    assert run(["run", "r.yaml"]) == 0
    content = json.loads((model / name).read_text())
    content |= {"rms_norm_eps": 0.5} if name == "config.json" else {"bos_token": "</s>"}
    (model / name).write_text(json.dumps(content))
    generate = ["generate", "--model", str(model), "--runs", "here", "--prompt", "a fox", "--max-new-tokens", "2"]
    assert run([*generate, "--sparsity", "0.5"]) == (3 if name == "config.json" else 0)
    capsys.readouterr()
    assert run(["run", "r.yaml"]) == 0
    assert "done before" not in capsys.readouterr().err
    (export,) = Path("here/tiny").glob("fisher-*")
    altered = json.loads((export / "config.json").read_text()) | {"rms_norm_eps": 0.25}
    (export / "config.json").write_text(json.dumps(altered))
    assert run(["generate", "--model", str(export), "--prompt", "a fox"]) == 3
