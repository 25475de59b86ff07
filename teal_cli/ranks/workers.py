"""Starting the ranks of one command, and ending all of them with the first that fails.

torch.distributed's elastic library starts and watches them, as torchrun does.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

from torch.distributed import TCPStore
from torch.distributed.elastic.multiprocessing import (
    DefaultLogsSpecs,
    PContext,
    ProcessFailure,
    RunProcsResult,
    SignalException,
    Std,
    start_processes,
)

from teal_cli.errors import EXIT_INTERRUPTED, MachineError
from teal_cli.ranks.environment import LAUNCHER, LOST
from teal_cli.ranks.group import MULTICAST_OFF

_HOST = "127.0.0.1"
_PREFIX = "teal-ranks-"
_OLD_SECONDS = 60
"""A younger folder may not be locked yet."""
_LOOK_EVERY = 0.2
_GRACE = 4
"""Seconds that ranks get to end by themselves, before they are killed."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""Which torch's library makes exceptions of."""
_QUIET = {"TORCH_CPP_LOG_LEVEL": "FATAL", "TORCH_DISTRIBUTED_DEBUG": "OFF"}
"""One line says what went wrong; the libraries' threads would say it again and again."""


def run_workers(count: int, command: Sequence[str], logs: str | None = None, *, drains: bool = False) -> int:
    """Run a Python program on so many ranks of this machine, until all have ended.

    The first rank has this process's streams; what the others print is thrown away.

    Args:
        count: of ranks.
        command: what the interpreter is given. The program calls `end_with_launcher` at its start.
        logs: folder that keeps what the others print.
        drains: whether the first signal is passed on to the first rank, which ends the others when its work is done.

    Returns:
        130 where it was interrupted, else 0.

    Raises:
        RankError: a rank failed, with the exit code of its error; one that died has the code of `MachineError`.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    store = TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": _HOST,
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # of this process, which has it open
        LAUNCHER: str(os.getpid()),
        **MULTICAST_OFF,
        **_QUIET,
    }
    environments = {rank: {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)}
    with _handlers_restored(), own_folder() as folder:
        started, drained, last = None, False, signal.SIGTERM
        try:
            started = start_processes(
                name="teal",
                entrypoint=sys.executable,
                args={rank: tuple(command) for rank in range(count)},
                envs=environments,
                logs_specs=DefaultLogsSpecs(logs or folder, redirects=dict.fromkeys(range(1, count), Std.ALL)),
            )
            _close_quickly(started)
            try:
                found = started.wait(period=_LOOK_EVERY)
            except (SignalException, KeyboardInterrupt):
                if not drains:
                    raise
                last = signal.SIGKILL  # of a second one: who drains heeds no other signal
                with contextlib.suppress(ProcessLookupError):  # it may have been told, and ended, before
                    os.kill(started.pids()[0], signal.SIGTERM)
                found, drained = started.wait(period=_LOOK_EVERY), True
        except (SignalException, KeyboardInterrupt):
            return EXIT_INTERRUPTED
        finally:
            for number in _SIGNALS:  # a second one is not needed: all end within seconds, and the folder is removed
                signal.signal(number, signal.SIG_IGN)
            if started is not None:
                started.close(last, timeout=_GRACE)
        if drained and found is not None and 0 not in found.failures:
            return 0  # others may have missed the first one, where it ended while it loaded
        if drained and found is not None and found.failures[0].exitcode == -signal.SIGTERM:
            return EXIT_INTERRUPTED  # before it could drain
        return _ended(found)


def _close_quickly(started: PContext) -> None:
    """What has failed to end by itself is killed after our time, and not after the library's half a minute."""
    started.close = partial(started.close, timeout=_GRACE)  # type: ignore[method-assign]


@contextlib.contextmanager
def _handlers_restored() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def own_folder() -> Iterator[str]:
    """Where ranks say why they failed. What killed launchers have left is removed: it has no lock any more."""
    for left in Path(gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), _locked(left):
            if left.stat().st_mtime < time.time() - _OLD_SECONDS:
                shutil.rmtree(left)
    with TemporaryDirectory(prefix=_PREFIX) as folder, _locked(Path(folder)):
        yield folder


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder.

    Raises:
        OSError: another process holds it, or the folder is somebody else's.
    """
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(opened).st_uid != os.getuid():
            raise PermissionError(folder)
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(opened)


class RankError(MachineError):
    """A rank failed.

    Args:
        message: one line.
        exit_code: of the process.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def _ended(found: RunProcsResult | None) -> int:
    failures = list(found.failures.values()) if found is not None else []
    if not failures:
        return 0
    first = min(failure.timestamp for failure in failures)
    worst = min(failures, key=lambda failure: _how_far_from_cause(failure, failure.timestamp - first))
    raise RankError(_line(worst), worst.exitcode if 0 < worst.exitcode < 128 else MachineError.exit_code)


def _how_far_from_cause(failure: ProcessFailure, seconds: int) -> int:
    """A rank that died comes before one that says why, and that before one that only missed another.

    Args:
        failure: of a rank.
        seconds: behind the first failure. Those that did not end by themselves were killed after a while.
    """
    if failure.exitcode < 0:
        return 3 if failure.exitcode == -signal.SIGTERM or seconds >= _GRACE - 1 else 0
    return 2 if failure.message.startswith(LOST) or not failure.error_file_data else 1


def _line(failure: ProcessFailure) -> str:
    if failure.exitcode < 0:
        return f"rank {failure.local_rank} died of {signal.Signals(-failure.exitcode).name}: all ranks have been ended"
    if failure.error_file_data:
        return str(failure.message)
    return f"rank {failure.local_rank} ended with exit code {failure.exitcode}: all ranks have been ended"
