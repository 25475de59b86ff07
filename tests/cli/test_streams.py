"""stdin, stdout and stderr of any encoding, closed, full, or without a reader."""

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import save_tiny

from teal_cli.cli import run
from teal_cli.cli.generate import converse, read_stdin
from teal_cli.cli.output import finish
from teal_cli.config import GenerateConfig, InfoConfig
from teal_cli.console import QUIET, Reporter
from teal_cli.errors import UsageError, as_teal_error
from teal_cli.plain_table import PlainTable
from teal_cli.steps.generate import Generator

_TEAL = f"{sys.executable} -m teal_cli"


def _shell(command: str, **environment: str) -> tuple[int, str, str]:
    result = subprocess.run(["bash", "-c", command], env=os.environ | environment, capture_output=True, check=False)
    return result.returncode, result.stdout.decode(), result.stderr.decode()


@pytest.mark.parametrize("arguments", ["--version", "--help", "calibrate --help", "--show-completion bash"])
@pytest.mark.parametrize("where", ["| true; exit ${PIPESTATUS[0]}", ">&-", ">&- 2>&- <&-"])
def test_a_reader_that_went_away_is_no_error(arguments: str, where: str) -> None:
    assert _shell(f"{_TEAL} {arguments} {where}") == (0, "", "")


@pytest.mark.parametrize("arguments", ["--version", "--help"])
@pytest.mark.parametrize(("where", "message"), [(">/dev/full", "the disk is full"), ("</dev/null 1<&0", "stdout")])
def test_a_stdout_that_cannot_be_written(arguments: str, where: str, message: str) -> None:
    code, _, said = _shell(f"{_TEAL} {arguments} {where}")
    assert (code, said.count("\n")) == (4, 1)
    assert said.startswith("teal: ")
    assert message in said


@pytest.mark.parametrize("where", ["2>/dev/full", "2>&-", "2> >(true)"])
def test_a_stderr_that_cannot_be_written_changes_no_exit_code(where: str) -> None:
    assert _shell(f"{_TEAL} calibrate --tokens many {where}")[:2] == (2, "")


_SHOWN = """
from teal_cli.report.streams import prepare_streams
from teal_cli.console import Reporter
from teal_cli.plain_table import PlainTable
prepare_streams()
table = PlainTable("modèle", "", "ppl")
table.add_row("中", "1.0 ± 0.1")
Reporter().show(table)
Reporter().say("modèle")
"""


@pytest.mark.parametrize(("encoding", "a", "plus"), [("ascii", "\\xe8", "\\xb1"), ("latin-1", "è", "±")])
def test_what_an_encoding_lacks_is_written_otherwise(encoding: str, a: str, plus: str) -> None:
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    result = subprocess.run([sys.executable, "-c", _SHOWN], env=environment, capture_output=True, check=True)
    shown = result.stdout.decode(encoding)
    assert f"mod{a}le" in shown
    assert f"1.0 {plus} 0.1" in shown
    assert "\\u4e2d" in shown
    assert "+---" in shown
    assert result.stderr.decode(encoding) == f"mod{a}le\n"


def _stdin(content: bytes, encoding: str = "utf-8", errors: str = "surrogateescape") -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(content), encoding=encoding, errors=errors)


@pytest.mark.parametrize("text", ["  a river\n", "\r\n\ta\r\n", "été 中"])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_prompt_on_stdin_is_taken_as_it_is(monkeypatch, text: str, encoding: str) -> None:
    monkeypatch.setattr("sys.stdin", _stdin(text.encode(), encoding))
    assert read_stdin() == text


def test_a_prompt_in_another_encoding(monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", _stdin("café naïve".encode("latin-1")))
    with pytest.raises(UsageError, match="the prompt on stdin is not utf-8"):
        read_stdin()
    monkeypatch.setattr("sys.stdin", _stdin("café".encode("latin-1"), "latin-1"))
    assert read_stdin() == "café"


def test_a_prompt_without_end(monkeypatch) -> None:
    with Path("/dev/zero").open() as endless:
        monkeypatch.setattr("sys.stdin", endless)
        with pytest.raises(UsageError, match="has more than 16,777,216 characters"):
            read_stdin()


@pytest.fixture(scope="module")
def generator(tmp_path_factory) -> Generator:
    model = save_tiny(tmp_path_factory.mktemp("model") / "tiny")
    return Generator(GenerateConfig(model=str(model), sparsity=0.0, max_new_tokens=8), QUIET)


class _Closed(io.StringIO):
    """A pipe whose reader goes away after a while."""

    def write(self, text: str) -> int:
        if self.tell() >= 1:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        return super().write(text)


def test_generate_into_a_pipe_that_is_closed(generator: Generator, monkeypatch) -> None:
    """The reply ends with its reader, unless --json is to have it whole."""
    command = ["generate", "--model", generator.config.model, "--sparsity", "0", "--max-new-tokens", "8"]
    for further, written in ((["--prompt", "stars"], False), (["--prompt", "stars", "--json", "g.json"], True)):
        monkeypatch.setattr("sys.stdout", _Closed())
        assert run([*command, *further]) == 0
        assert Path("g.json").exists() is written
    assert json.loads(Path("g.json").read_text())["tokens"] == 8


@pytest.mark.parametrize("terminal", [True, False])
def test_control_characters_of_a_model(generator: Generator, monkeypatch, terminal: bool) -> None:
    """A pipe gets the text, a terminal what it can show."""
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    monkeypatch.setattr("sys.stdout", stream)

    def reply(self: Generator, messages: object, write: object) -> object:
        write("a\x1b[2Jb\n\tc")
        raise KeyboardInterrupt

    monkeypatch.setattr(Generator, "reply", reply)
    command = [
        "generate",
        "--model",
        generator.config.model,
        "--sparsity",
        "0",
        "--prompt",
        "x",
        "--max-new-tokens",
        "4",
    ]
    assert run(command) == 130
    assert stream.getvalue() == ("a\\x1b[2Jb\n\tc" if terminal else "a\x1b[2Jb\n\tc")


def test_lines_of_a_conversation_in_another_encoding(generator: Generator, monkeypatch, capsys) -> None:
    lines = iter(["caf\udce9", "stars"])

    def ask(prompt: str) -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", ask)
    converse(generator, Reporter())
    said = capsys.readouterr().err
    assert "that line is not UTF-8" in said
    assert "8 tokens" in said


def _tables(result: dict) -> list[PlainTable]:
    return [PlainTable("the figures", "")]


def test_figures_are_shown_where_json_cannot_be_written(monkeypatch, capsys) -> None:
    config = InfoConfig(json="r.json")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr("teal_cli.atomic.write_json", full)
        with pytest.raises(OSError, match="full"):
            finish(config, Reporter(), {"a": 1}, _tables)
    assert "the figures" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdout", _Closed())
    with pytest.raises(BrokenPipeError):
        finish(config, Reporter(), {"a": 1}, lambda result: _tables(result) * 2)
    assert json.loads(Path("r.json").read_text())["a"] == 1


def test_an_error_is_one_line_that_is_short_and_not_obeyed(capsys, monkeypatch) -> None:
    for argument in ("x" * 100_000, "a\x1b[31m\nb", "[/]"):
        assert run([argument]) == 2
        assert run(["inspect", argument]) == 3
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 2
        assert all(len(line) < 2_100 and "\x1b" not in line for line in lines)
    assert as_teal_error(EOFError()) is None
    monkeypatch.setattr("teal_cli.steps.inspect.inspect", lambda *_, **__: (_ for _ in ()).throw(EOFError("cut off")))
    assert run(["inspect", "."]) == 1  # and not "interrupted"


def test_a_reply_is_kept_where_stdout_is_full(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "tiny")
    code, _, said = _shell(
        f"{_TEAL} generate --model {model} --sparsity 0 --prompt fox --max-new-tokens 3 --json r.json >/dev/full"
    )
    assert code == 4
    assert "the disk is full" in said.splitlines()[-1]
    assert json.loads(Path("r.json").read_text())["tokens"] == 3


def test_a_width_that_no_terminal_has() -> None:
    code, shown, _ = _shell(f"timeout 20 {_TEAL} --help", COLUMNS="9999999999")
    assert code == 0
    assert len(shown) < 100_000
