"""What reaches a terminal, a pipe or a file: texts as they are, nothing obeyed, nothing cut."""

import io
import re

import pytest
from rich.console import Console

from teal_cli.console import Reporter
from teal_cli.plain_table import PlainTable, facts_table
from teal_cli.report.page import listed

_NAMES = ["[bold]x[/bold]", "[/]", "a[link=x]b", "wiki:en:train:text", "esc\x1b[31m\x07\x9b0m", "a\u202eb"]


def _streams(monkeypatch: pytest.MonkeyPatch, *, terminal: bool = False) -> io.StringIO:
    """stdout and stderr in one: a pipe, or a terminal of 40 columns. pytest sets its own before each phase."""
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    monkeypatch.setattr("sys.stdout", stream)
    monkeypatch.setattr("sys.stderr", stream)
    for name, value in {"COLUMNS": "40", "TERM": "xterm", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    return stream


def _safe(text: str) -> str:
    return text.replace("\x1b", "\\x1b").replace("\x07", "\\x07").replace("\x9b", "\\x9b").replace("\u202e", "\\u202e")


@pytest.mark.parametrize("name", _NAMES)
def test_texts_are_no_markup_and_no_commands(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    pipe = _streams(monkeypatch)
    table = PlainTable(f"Calibration of {name}", name, "figures")
    table.add_row(name, "1")
    reporter = Reporter()
    reporter.show(table)
    reporter.say(f"written to {name}")
    reporter.show_text(f"> {name}")
    lines = pipe.getvalue().splitlines()
    assert lines[0] == f"Calibration of {_safe(name)}"
    assert lines[-2:] == [f"written to {_safe(name)}", f"> {_safe(name)}"]
    assert pipe.getvalue().count(_safe(name)) == 5
    page = listed(table)
    assert (page.title, page.header[0], page.rows) == (
        f"Calibration of {_safe(name)}",
        _safe(name),
        [[_safe(name), "1"]],
    )


@pytest.mark.parametrize("name", _NAMES)
def test_progress(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    terminal = _streams(monkeypatch, terminal=True)
    with Reporter().progress(f"calibrating on {name}", 10) as advance:
        advance(5)
    shown = terminal.getvalue()
    assert _safe(name)[:12] in shown.replace("\n", "")
    assert "\x1b[31m" not in shown
    assert "\x9b" not in shown


@pytest.mark.parametrize("quiet", [False, True])
def test_a_pipe_gets_a_line_of_progress_now_and_then(monkeypatch: pytest.MonkeyPatch, quiet: bool) -> None:
    pipe, clock = _streams(monkeypatch), [100.0]
    monkeypatch.setattr("teal_cli.console.time.monotonic", lambda: clock[0])
    with Reporter(quiet).progress("calibrating", 32768) as advance:
        for seconds, said in ((29, None), (2, None), (29, "loss 2.1"), (1, None)):
            clock[0] += seconds
            advance(2048, said)
    lines = ["calibrating: 4,096/32,768", "loss 2.1: 8,192/32,768"]
    assert pipe.getvalue().splitlines() == ([] if quiet else lines)


_LONG = [f"fisher-site-0.{digits}" for digits in (50, 51)]


def _wide() -> PlainTable:
    table = PlainTable("Checkpoints", "", *[f"kind {index}" for index in range(12)])
    for name in _LONG:
        table.add_row(name, *["0.500 ± 0.001"] * 12)
    return table


def test_a_pipe_gets_a_row_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = _streams(monkeypatch)
    Reporter().show(_wide())
    rows = [line for line in pipe.getvalue().splitlines() if "fisher" in line]
    assert [row.split()[1] for row in rows] == _LONG
    assert all(row.count("0.500 ± 0.001") == 12 for row in rows)


@pytest.mark.parametrize(("columns", "widest"), [(None, 160), ("60", 60), ("0", 160), ("many", 160)])
def test_a_pipe_gets_texts_folded_between_words(
    monkeypatch: pytest.MonkeyPatch, columns: str | None, widest: int
) -> None:
    pipe = _streams(monkeypatch)
    monkeypatch.delenv("COLUMNS")
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    types = [f"architecture_{index}" for index in range(60)]
    table = facts_table("Machine")
    table.add_row("model types", ", ".join(types))
    Reporter().show(table)
    lines = pipe.getvalue().splitlines()[1:]
    assert {len(line) for line in lines} == {widest}
    assert re.findall(r"architecture_\d+", pipe.getvalue()) == types


def test_a_pipe_gets_a_path_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = _streams(monkeypatch)
    path = "/" + "/".join(["folder"] * 40)
    table = facts_table("Machine")
    table.add_row("a label that is folded, " * 10, path)
    Reporter().show(table)
    assert f" {path} " in pipe.getvalue()


@pytest.mark.parametrize("columns", [13, 3])
def test_a_narrow_terminal_folds_and_cuts_nothing(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    terminal = _streams(monkeypatch, terminal=True)
    table = _wide()
    table.columns = table.columns[:columns]
    Reporter().show(table)
    shown = terminal.getvalue()
    assert "…" not in shown
    lines = [line.strip("│┃").split("│") for line in shown.splitlines() if line.startswith("│")]
    assert "".join(line[0].strip() for line in lines) == "".join(_LONG)
    last = "".join(line[-1].strip() for line in lines)
    assert last.replace(" ", "") == "0.500±0.001" * 2
    if columns == 3:
        assert {len(line) for line in shown.splitlines() if line.startswith("│")} == {40}


def test_facts_have_no_header() -> None:
    table = facts_table("Facts")
    table.add_row("model", "m")
    assert listed(table).header == []
    console = Console(width=40, file=io.StringIO())
    console.print(table)
    assert console.file.getvalue().count("\n") == 3


def test_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = _streams(monkeypatch)
    reporter = Reporter(quiet=True)
    reporter.show(_wide())
    reporter.say("x")
    assert pipe.getvalue() == ""
