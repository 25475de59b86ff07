"""What a person sees while a verb works: messages and progress on stderr, results on stdout."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from teal_cli.errors import printable
from teal_cli.plain_table import PlainTable

_NO_TERMINAL = 100_000
"""Columns of a file or a pipe, for rows of figures."""
_TEXTS_IN_FILE = 160
"""Columns of a table of texts there, where COLUMNS names no other number."""


_LINE_EVERY = 30.0
"""Seconds between two lines of progress, where there is no terminal for a bar."""


class _TokensPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f} tokens/s" if task.speed else "", style="cyan")


class _Results(Console):
    """stdout. A terminal's width is kept to. A file or a pipe takes a row of figures in one line, of any length, for
    scripts; texts are folded there between words, for people.
    """

    def __init__(self, quiet: bool) -> None:
        super().__init__(quiet=quiet, highlight=False, markup=False, emoji=False)
        if not self.is_terminal:
            self.width = _NO_TERMINAL

    def show(self, table: PlainTable) -> None:
        """All of a table: what does not fit stands out, and is not cut."""
        if self.is_terminal or table.figures:
            self.print(table, crop=False)
            return
        table.keep_words()
        columns = os.environ.get("COLUMNS", "")
        self.print(table, crop=False, width=int(columns) if columns.isdecimal() and int(columns) else _TEXTS_IN_FILE)

    def on_broken_pipe(self) -> None:
        """Let the caller see it: rich would exit with 1, as if something had failed."""
        raise BrokenPipeError


class Reporter:
    """Talks to the user; `quiet` silences all but errors.

    Messages and progress go to stderr, so that stdout can be piped. Whatever is said is shown as it is: names of
    models and texts of artefacts are no markup, and their control characters do not reach the terminal.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.err = Console(stderr=True, quiet=quiet, highlight=False, markup=False, emoji=False)
        self.out = _Results(quiet)

    def say(self, message: str) -> None:
        """One line about what happens now."""
        self.err.print(printable(message), soft_wrap=True)

    def show(self, table: PlainTable) -> None:
        """A result."""
        if table.heading:
            self.out.print(Text(table.heading, style="table.title"), soft_wrap=True)
        self.out.show(table)

    def show_text(self, text: str) -> None:
        """A result in words, such as a sample of what a model wrote."""
        self.out.print(printable(text), soft_wrap=True)

    @contextmanager
    def progress(self, description: str, total: int) -> Iterator[Callable[..., None]]:
        """A bar over `total` tokens, with tokens/s and time left; yields the function that advances it.

        That takes the tokens, and may take what stands before the bar from now on. In a file or a pipe it is a line
        now and then, so that a long wait is not silent.
        """
        if not self.err.is_terminal:
            yield self._lines_of_progress(description, total)
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            _TokensPerSecond(),
            TimeRemainingColumn(),
        )
        # Drawn when it advances, not by a thread of its own, which would take time from what is timed.
        with Progress(
            *columns,
            console=self.err,
            transient=True,
            auto_refresh=False,
            disable=self.quiet,
        ) as bars:
            task = bars.add_task(printable(description), total=total)
            bars.refresh()

            def advance(tokens: int, said: str | None = None) -> None:
                bars.update(task, advance=tokens, description=None if said is None else printable(said))
                bars.refresh()

            yield advance

    def _lines_of_progress(self, description: str, total: int) -> Callable[..., None]:
        """What advances it."""
        done, last = 0.0, time.monotonic()

        def advance(tokens: float, said: str | None = None) -> None:
            nonlocal description, done, last
            done, description = done + tokens, said or description
            if time.monotonic() - last >= _LINE_EVERY:
                last = time.monotonic()
                self.say(f"{description}: {done:,.0f}/{total:,.0f}")

        return advance


QUIET = Reporter(quiet=True)
"""For library use."""
