"""Flags that have another spelling: both run, and the help shows one."""

from pathlib import Path

import pytest

from teal_cli.cli import VERBS, run
from teal_cli.config import OTHER_SPELLINGS
from teal_cli.config_files import flag_name
from tests.conftest import save_tiny


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_one_spelling(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert not any(other in text for other in map(flag_name, OTHER_SPELLINGS.values()))
    assert ("--quantise" in text) is (verb in ("calibrate", "adapt", "export", "eval", "bench", "generate", "serve"))


def test_either_spelling_runs(corpus: Path, tmp_path: Path) -> None:
    shared = ["--model", str(save_tiny(tmp_path / "tiny")), "--device", "cpu", "--quiet"]
    text = ["--dataset", str(corpus), "--tokens", "128", "--seq-len", "64", "--sensitivity-tokens", "0"]
    assert run(["calibrate", *shared, *text, "--quantize", "int4:32", "--no-quantize-output"]) == 0
    assert Path("runs/tiny-int4-32/calibration.json").is_file()
    for flags in (["--quantise", "int4:32", "--no-propagate"], ["--quantize", "int4:32", "--recalibrate"]):
        assert run(["export", *shared, "--allocation", "uniform", *flags]) == 0


def test_both_spellings_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "--quantize", "int8", "--quantise", "int4"]) == 2
    assert capsys.readouterr().err == (
        "teal: quantize (flag --quantize) is another spelling of quantise (flag --quantise): give one of the two\n"
    )
    assert run(["export", "--recalibrate", "--no-propagate"]) == 2
    assert "give one of the two" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["8", "[int8]", "{bits: 8}"])
def test_a_kind_of_weights_that_is_no_text_is_refused_in_the_users_words(
    value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(f"quantize: {value}\n")
    assert run(["export", "--config", str(tmp_path / "c.yaml")]) == 2
    message = capsys.readouterr().err
    assert "quantise (flag --quantise): " in message
    assert "is not int8, int4 or int4:GROUP" in message


@pytest.mark.parametrize(
    ("verb", "own", "shared"), [("generate", "--prompt", "--quantise"), ("adapt", "--recipe", "--limits")]
)
def test_help_shows_a_verbs_own_flags_first(
    verb: str, own: str, shared: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([verb, "--help"]) == 0
    shown = capsys.readouterr().out
    assert 0 < shown.index(f" {own} ") < shown.index(f" {shared} ")
    assert "{'" not in shown
