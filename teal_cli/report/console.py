"""What a person sees while a verb works: messages and progress on stderr, results on stdout."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text


class _TokensPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f} tokens/s" if task.speed else "", style="cyan")


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Let the caller see it: rich would exit with 1, as if something had failed."""
        raise BrokenPipeError


class Reporter:
    """Talks to the user; `quiet` silences all but errors.

    Messages and progress go to stderr, so that stdout can be piped.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.err = _Console(stderr=True, quiet=quiet, highlight=False)
        self.out = _Console(quiet=quiet, highlight=False)

    def say(self, message: str) -> None:
        """One line about what happens now."""
        self.err.print(message, markup=False, soft_wrap=True)

    def show(self, table: Table) -> None:
        """A result."""
        self.out.print(table)

    @contextmanager
    def progress(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar over `total` tokens, with tokens/s and time left; yields the function that advances it."""
        columns = (
            TextColumn("{task.description}"),
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
            disable=self.quiet or not self.err.is_terminal,
        ) as bars:
            task = bars.add_task(description, total=total)
            bars.refresh()

            def advance(tokens: int) -> None:
                bars.advance(task, tokens)
                bars.refresh()

            yield advance


QUIET = Reporter(quiet=True)
"""For library use."""
