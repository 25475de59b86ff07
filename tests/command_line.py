"""Commands that tests of several files run: one that must fail, and a calibration that is made once."""

import shutil
from pathlib import Path

import pytest
from conftest import save_tiny, write_corpus

from teal_cli.cli import run


def fails(capsys: pytest.CaptureFixture[str], code: int, message: str, *arguments: object) -> None:
    """One line on stderr after whatever was said before, and the exit code."""
    capsys.readouterr()
    assert run([str(argument) for argument in arguments]) == code
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("teal: ")]
    assert len(errors) == 1
    assert message in errors[0]


def calibrate_on(corpus: Path, model: Path, runs: Path = Path("runs")) -> None:
    """The model's calibration on 512 tokens of a text."""
    flags = ["--model", str(model), "--runs", str(runs), "--dataset", str(corpus), "--quiet"]
    assert run(["calibrate", *flags, "--tokens", "512", "--seq-len", "64"]) == 0


def calibrate_once(home: Path, *, chat: bool) -> Path:
    """HOME/tiny, a model, and HOME/runs/tiny, its calibration on 512 tokens. For `copied`, not to be changed."""
    calibrate_on(write_corpus(home / "corpus.txt"), save_tiny(home / "tiny", chat=chat), home / "runs")
    return home


def copied(home: Path, folder: Path) -> Path:
    """A copy of the model in FOLDER, and of its calibration where verbs look for it: runs/tiny."""
    shutil.copytree(home / "runs", "runs")
    return Path(shutil.copytree(home / "tiny", folder / "tiny"))
