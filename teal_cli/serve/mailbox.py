"""From the scheduler's thread to the event loop, which is woken once for all that a step gave."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any


class Mailbox:
    """What one thread says to those who wait in an event loop.

    To wake the loop for each token would cost that thread a system call for each, and the loop would take the
    interpreter from it between two tokens of a step.

    Args:
        loop: in whose thread everything is delivered.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._said = deque[tuple[Callable[[Any], object], Any]]()
        self._is_waking = False

    def put(self, deliver: Callable[[Any], object], what: Any) -> None:
        """Say something, which lies there until `wake`. Any thread may.

        Raises:
            RuntimeError: the event loop has ended.
        """
        if self._loop.is_closed():
            raise RuntimeError("nobody hears: the event loop has ended")
        self._said.append((deliver, what))

    def wake(self) -> None:
        """Have it delivered. Any thread may; nothing is done where nothing lies there."""
        if not self._said or self._is_waking:
            return
        self._is_waking = True
        try:
            self._loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:  # the loop has ended since
            self._said.clear()

    def _deliver(self) -> None:
        self._is_waking = False  # what is said from here on may wake the loop again
        while self._said:
            deliver, what = self._said.popleft()
            deliver(what)
