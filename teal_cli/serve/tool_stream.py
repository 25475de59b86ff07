"""Text on its way to a client, of which calls of tools are held back until they are whole."""

from collections.abc import Collection

from teal_cli.serve.stop_strings import StopStrings
from teal_cli.serve.tool_calls import ToolCall, ToolFormat, begins_bare, parse_calls


class ToolStream:
    """Lets the text before the first call through; what turns out to be no call follows at the end.

    Args:
        notation: how calls are written.
        names: of the tools that may be called.
    """

    def __init__(self, notation: ToolFormat, names: Collection[str]) -> None:
        self._notation, self._names = notation, names
        self._before = StopStrings(notation.begins)
        self._held = ""
        self._may_be_bare = notation.bare
        self.calls: list[ToolCall] = []
        """Known at the end."""

    def put(self, text: str) -> str:
        """Take a piece; what of it is surely no call."""
        self._held += text
        if self._before.found is not None or (self._may_be_bare and begins_bare(self._held)):
            return ""
        self._may_be_bare = False
        return self._let_through()

    def end(self) -> str:
        """No more comes: what was held, if it is no call."""
        through = ""
        if self._before.found is None:
            bare = self._notation.bare and self._held.lstrip().startswith("{")
            if bare and (calls := parse_calls(self._held, self._notation, self._names, bare=True)):
                self.calls = calls
                return ""
            through = self._let_through() + self._before.end()
        if self._before.found is not None:
            held = self._before.found + self._held
            self.calls = parse_calls(held, self._notation, self._names)
            if not self.calls:
                through += held
        return through

    def _let_through(self) -> str:
        """What stands before the first mark; from there on everything is held."""
        text, self._held = self._held, ""
        through = self._before.put(text)
        if self._before.found is not None:
            self._held = self._before.rest
        return through
