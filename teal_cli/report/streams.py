"""The standard streams: whatever their encoding, and whether or not anybody is at the other end."""

import io
import os
import sys
from contextlib import suppress
from typing import TextIO

_MOST_DIGITS = 4
"""Of a terminal's width."""


def prepare_streams() -> None:
    """Make stdin, stdout and stderr usable, once, before anything else opens a file.

    One that was closed leads nowhere: the next file to be opened would get its number, and what is printed.
    What an encoding lacks is written as `\\xb1`. What cannot be written to stderr is lost.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            with suppress(OSError):  # the lowest free number, which is this one
                os.open(os.devnull, os.O_RDWR)
                stream = open(number, "w" if number else "r", encoding="utf-8", closefd=False)  # noqa: SIM115
                setattr(sys, name, stream)
    if len(os.environ.get("COLUMNS", "")) > _MOST_DIGITS:  # rich would fill a line of it with blanks
        del os.environ["COLUMNS"]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if isinstance(sys.stderr, io.TextIOWrapper):
        encoding = sys.stderr.encoding
        sys.stderr = _Messages(sys.stderr.detach(), encoding, errors="backslashreplace", line_buffering=True)


class _Messages(io.TextIOWrapper):
    """stderr, which is silent from when it cannot be written: work does not end because nobody reads about it."""

    def write(self, text: str) -> int:
        """As of any stream, but without errors of the system."""
        try:
            return super().write(text)
        except OSError:
            silence(self)
            return len(text)

    def flush(self) -> None:
        """The same."""
        try:
            super().flush()
        except OSError:
            silence(self)


def silence(stream: TextIO) -> None:
    """Let a stream that cannot be written lead nowhere, with what it still holds.

    Python writes that at the end of the process, and exits with 120 where it cannot.
    """
    with suppress(OSError, ValueError):  # of a stream in memory, which has no number
        number = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)
