"""Work that is given up after some time."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class OutOfTimeError(Exception):
    """The work did not end in time."""


class _Late(BaseException):
    """Not an `Exception`: libraries that catch those must let it pass, as they let Ctrl-C."""


_AGAIN = 5.0
"""Seconds after which the alarm comes again."""


def can_stop() -> bool:
    """Whether work of this thread can be given up: of the main thread of a Unix process that uses no alarm itself."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        return False
    return signal.getitimer(signal.ITIMER_REAL)[0] == 0.0


@contextmanager
def deadline(seconds: float | None) -> Iterator[None]:
    """Give up what the block does after some time; None for never. What it leaves behind is as after Ctrl-C.

    Raises:
        OutOfTimeError: it took longer.
        RuntimeError: work of this thread cannot be given up (`can_stop`).
    """
    if seconds is None:
        yield
        return
    if not can_stop():
        raise RuntimeError("work of this thread cannot be given up")

    def late(number: int, frame: object) -> None:
        raise _Late

    before = signal.signal(signal.SIGALRM, late)
    try:
        # Again after a while: what is raised in a callback of the garbage collector is printed, and lost.
        signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
    except _Late:
        raise OutOfTimeError(f"it took longer than {seconds:.0f} s") from None
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_DFL if before is None else before)
