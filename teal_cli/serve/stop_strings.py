"""Strings at which a reply ends, in text that comes piece by piece."""

from collections.abc import Sequence


class StopStrings:
    """Lets text through until one of some strings comes; that string, and all after it, is left out.

    Text that may be the beginning of one waits until more has come. Of several, the one that is whole first counts,
    however the text is cut into pieces.

    Args:
        strings: none of them empty.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._waiting = ""
        self.found: str | None = None
        """The string at which the text ended."""
        self.rest = ""
        """What stood behind it in the piece that brought it."""

    def put(self, text: str) -> str:
        """Take a piece, and return what is certain to be part of the reply."""
        if self.found is not None:
            return ""
        self._waiting += text
        found = [(at + len(stop), at, stop) for stop in self._strings if (at := self._waiting.find(stop)) >= 0]
        if found:
            _, at, self.found = min(found)
            certain, self.rest = self._waiting[:at], self._waiting[at + len(self.found) :]
            self._waiting = ""
            return certain
        return self._let_go(self._open())

    def end(self) -> str:
        """What waits still: no more text comes."""
        return self._let_go(0)

    def _let_go(self, kept: int) -> str:
        cut = len(self._waiting) - kept
        certain, self._waiting = self._waiting[:cut], self._waiting[cut:]
        return certain

    def _open(self) -> int:
        """Characters at the end that may be the beginning of a string: the most of them."""
        for length in range(min(max(map(len, self._strings), default=1) - 1, len(self._waiting)), 0, -1):
            end = self._waiting[-length:]
            if any(len(stop) > length and stop.startswith(end) for stop in self._strings):
                return length
        return 0
