"""Drafts that cost nothing: what followed the last tokens where they stood before (prompt lookup, n-grams)."""

from collections.abc import Sequence

LONGEST, SHORTEST = 4, 2
"""Tokens that must be the same before what is drafted."""


class NGrams:
    """Where each run of tokens of one sequence stood last."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._behind: dict[tuple[int, ...], int] = {}

    def __len__(self) -> int:
        """Tokens so far."""
        return len(self._tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Take tokens that follow."""
        for token in tokens:
            # What ends here is entered when its successor comes: a run must not find itself.
            for size in range(SHORTEST, LONGEST + 1):
                if len(self._tokens) >= size:
                    self._behind[tuple(self._tokens[-size:])] = len(self._tokens)
            self._tokens.append(token)

    def following(self, count: int) -> tuple[list[int], int]:
        """At most so many tokens that may follow, and how many tokens before them were the same: 0 for no tokens.

        Where the text ends before there are as many, it is read on from its own continuation, as text that repeats
        itself goes on.
        """
        for size in range(LONGEST, SHORTEST - 1, -1):
            start = self._behind.get(tuple(self._tokens[-size:])) if len(self._tokens) >= size else None
            if start is None:
                continue
            known = self._tokens[start:]
            found = [known[index % len(known)] for index in range(count)]
            return found, size
        return [], 0
