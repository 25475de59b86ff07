"""`teal generate` without a prompt: replies to line after line, and what stays of each."""

from pathlib import Path
from typing import Any

import pytest
from command_line import calibrate_once, copied

from teal_cli.cli.generate import converse
from teal_cli.config import GenerateConfig
from teal_cli.console import QUIET, Reporter
from teal_cli.steps.generate import Generator


@pytest.fixture(scope="module")
def calibrated_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrate_once(tmp_path_factory.mktemp("calibrated"), chat=True)


@pytest.fixture
def calibrated(calibrated_home: Path, tmp_path: Path) -> Path:
    return copied(calibrated_home, tmp_path)


def test_turns_draw_other_numbers_and_the_first_is_that_of_the_seed(calibrated: Path) -> None:
    config = GenerateConfig(model=str(calibrated), max_new_tokens=12, temperature=2.0, seed=3)
    first, again = (Generator(config, QUIET) for _ in range(2))
    replies = [first.reply([{"role": "user", "content": "the stars"}]).text for _ in range(2)]
    assert replies[0] != replies[1]
    assert again.reply([{"role": "user", "content": "the stars"}]).text == replies[0]


def test_conversation(calibrated: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines are answered, history grows, /new forgets, Ctrl-C stays, Ctrl-D leaves."""
    generator = Generator(GenerateConfig(model=str(calibrated), max_new_tokens=5), QUIET)
    lines = iter(["one", "two", "", KeyboardInterrupt, "/new", "three", EOFError])
    seen: list[list[str]] = []

    def answer(prompt: str = "") -> str:
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    original = generator.reply
    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr(
        generator, "reply", lambda m, write: seen.append([x["role"] for x in m]) or original(m, write=write)
    )
    converse(generator, QUIET)
    assert seen == [["user"], ["user", "assistant", "user"], ["user"]]
    assert capsys.readouterr().out.count("\n") >= 3


@pytest.mark.parametrize("stopped_in", ["generate", "check_prompt"])
def test_a_reply_that_is_stopped_before_it_begins_leaves_no_turn(
    calibrated: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, stopped_in: str
) -> None:
    """In its prefill, and in the checks before that."""
    generator = Generator(GenerateConfig(model=str(calibrated), max_new_tokens=3, sparsity=0.0), QUIET)
    lines = iter(["stars", "rivers", "winds"])
    seen: list[list[str]] = []
    original, reply = getattr(generator.engine, stopped_in), generator.reply

    def answer(prompt: str = "") -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    def stop_the_second(*args: object, **options: object) -> object:
        if len(seen) == 2:
            raise KeyboardInterrupt
        return original(*args, **options)

    def watched(messages: list[dict[str, str]], write: Any) -> Any:
        seen.append([message["content"] for message in messages])
        return reply(messages, write=write)

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr(generator.engine, stopped_in, stop_the_second)
    monkeypatch.setattr(generator, "reply", watched)
    converse(generator, Reporter())
    first = seen[1][1]
    assert seen == [["stars"], ["stars", first, "rivers"], ["stars", first, "winds"]]
    assert "your line was taken back" in capsys.readouterr().err


def test_a_reply_that_ends_at_once_leaves_no_turn(
    calibrated: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop token is its first one."""
    generator = Generator(GenerateConfig(model=str(calibrated), max_new_tokens=3, sparsity=0.0), QUIET)
    lines = iter(["stars", "rivers", EOFError])
    seen: list[list[str]] = []
    reply = generator.reply

    def answer(prompt: str = "") -> str:
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    def ends_at_once(messages: list[dict[str, str]], write: Any) -> Any:
        seen.append([message["content"] for message in messages])
        with monkeypatch.context() as patched:
            if len(seen) == 1:
                patched.setattr(generator.engine, "generate", lambda *a, **k: iter(()))
            return reply(messages, write=write)

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr(generator, "reply", ends_at_once)
    converse(generator, Reporter())
    assert seen == [["stars"], ["rivers"]]
    assert "the model ended its reply at once: your line was taken back" in capsys.readouterr().err


def test_conversation_survives_a_full_context(
    calibrated: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = Generator(GenerateConfig(model=str(calibrated), max_new_tokens=5), QUIET)
    lines = iter(["stars " * 200, "stars", EOFError])

    def answer(prompt: str = "") -> str:
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", answer)
    converse(generator, Reporter())
    said = capsys.readouterr().err
    assert "exceed the model's context" in said
    assert "/new starts over" in said
    assert "5 tokens" in said
