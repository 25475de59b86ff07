"""Greedy tokens that lie where a session's next step reads them.

A step of the rows that they were picked for has its input already: nothing is launched for it. Any other step of the
session overwrites them. Then they are copied, if somebody still has one. Nobody is to ask for a token again that a step
took: that is an error, and never another token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class Picked:
    """The tokens of one step.

    Args:
        tokens: (rows,) int64 on the device. Who overwrites them asks `are_next` before, and else calls `leave`.
    """

    def __init__(self, tokens: Tensor) -> None:
        self._tokens: Tensor | None = tokens
        self._rows = len(tokens)
        self._are_there = True
        self._given: set[int] = set()
        """Rows whose tokens somebody has."""

    def of_row(self, row: int) -> "PickedToken":
        """One of them, for a step to take."""
        self._given.add(row)
        return PickedToken(self, row)

    def tensor(self, row: int) -> Tensor:
        """(1,) int64, to be read before any other step.

        Raises:
            RuntimeError: a step took it.
        """
        if self._tokens is None:
            raise RuntimeError("a token was asked for that a step has taken and overwritten")
        return self._tokens[row : row + 1]

    def are_next(self, tokens: "Sequence[Token]") -> bool:
        """Whether a step takes precisely these, in their order, from where they lie. Then nobody has them any more."""
        if not self._are_there or len(tokens) != self._rows:
            return False
        if [self._row_of(token) for token in tokens] != list(range(self._rows)):
            return False
        self._tokens, self._are_there = None, False
        return True

    def leave(self, tokens: "Sequence[Token]") -> None:
        """A step that takes others overwrites them: keep those that somebody else has."""
        if self._tokens is not None and self._are_there:
            taken = {self._row_of(token) for token in tokens}
            self._tokens = self._tokens.clone() if self._given - taken else None
        self._are_there = False

    def _row_of(self, token: "Token") -> int | None:
        return token.row if isinstance(token, PickedToken) and token.picked is self else None


class PickedToken:
    """The token of one row.

    Args:
        picked: by the step.
        row: of it.
    """

    def __init__(self, picked: Picked, row: int) -> None:
        self.picked, self.row = picked, row


Token = Tensor | PickedToken
"""(tokens,) int64 on the device, or one that a session has."""


def tensor_of(token: Token) -> Tensor:
    """(tokens,) int64 on the device, to be read before any other step.

    Raises:
        RuntimeError: a step took it.
    """
    return token.picked.tensor(token.row) if isinstance(token, PickedToken) else token


def tensor_of_all(tokens: Sequence[Token]) -> Tensor:
    """One behind the other; as of `tensor_of`."""
    found = [tensor_of(token) for token in tokens]
    return found[0] if len(found) == 1 else torch.cat(found)
