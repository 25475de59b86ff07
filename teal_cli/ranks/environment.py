"""What a launcher has told this process, and what this process tells it. Without torch."""

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path

from teal_cli.errors import UsageError

LAUNCHER = "TEAL_LAUNCHER"
"""Environment variable of the processes that the teal command starts: its process id."""
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Where torch's launchers have a process say why it failed."""
LOST = "another process of --tensor-parallel has ended or hangs"
"""What a rank says that ends because another one has."""
_PR_SET_PDEATHSIG = 1


def is_rank() -> bool:
    """Whether this process is one of several that a launcher has started."""
    return "RANK" in os.environ and (_number("WORLD_SIZE") or 1) > 1


def _number(name: str) -> int | None:
    """A variable that is a whole number, not below 0; None for anything else: others set these variables too."""
    text = os.environ.get(name, "")
    return int(text) if text.isascii() and text.isdigit() else None


def is_first() -> bool:
    """Whether this process talks to the user and writes files: the first rank, or one that is alone.

    To be asked where ranks were asked for: job schedulers set these variables for processes that are alone.
    """
    return not is_rank() or os.environ["RANK"] == "0"


def check_launched() -> None:
    """Refuse what a launcher has half told, where this process is a rank: job schedulers set RANK and WORLD_SIZE too.

    Raises:
        UsageError: it does not say which rank this is, of how many, or where they meet.
    """
    wrong = _what_is_wrong()
    if wrong is not None:
        raise UsageError(
            f"RANK and WORLD_SIZE are set and {wrong}: unset them for teal to start the processes of "
            "tensor_parallel (flag --tensor-parallel), or use torchrun"
        )


def _what_is_wrong() -> str | None:
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return None
    if _number("WORLD_SIZE") is None:
        return "WORLD_SIZE is no whole number"
    if not is_rank():
        return None
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            return f"{name} is not"
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
        if name in os.environ and _number(name) is None:
            return f"{name} is no whole number"
    return None if int(os.environ["RANK"]) < int(os.environ["WORLD_SIZE"]) else "RANK is not below WORLD_SIZE"


def has_launcher() -> bool:
    """Whether the teal command has started this process, which tells the first rank alone when to end."""
    return _number(LAUNCHER) is not None


def end_with_launcher() -> None:
    """Let the system end this process when the teal command that started it ends, in whatever way."""
    launcher = _number(LAUNCHER)
    if launcher is None or not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:  # it had ended before
        os._exit(0)


def tell_launcher(line: str) -> bool:
    """Say why this process fails, if the teal command started it: that prints one line for all ranks."""
    file = os.environ.get(ERROR_FILE)
    if LAUNCHER not in os.environ or file is None:
        return False
    Path(file).write_text(json.dumps({"message": line, "timestamp": str(int(time.time()))}), encoding="utf-8")
    return True
