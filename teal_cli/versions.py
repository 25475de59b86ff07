"""What made a result: the machine and the library versions, for every artefact and JSON."""

import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from teal_cli.version import __version__

_PACKAGES = ("torch", "transformers", "triton", "datasets", "safetensors")
_PACKAGE = Path(__file__).parent
_GIT_SECONDS = 10


def library_versions() -> dict[str, str]:
    """Installed versions of what results depend on; with `commit`, where that is known."""
    found = {"teal": __version__}
    checkout = commit()
    if checkout is not None:
        found["commit"] = checkout
    found["python"] = platform.python_version()
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@lru_cache(maxsize=1)
def commit() -> str | None:
    """The commit that this code is, `-dirty` behind it where tracked files differ; None where nothing tells.

    The variable TEAL_COMMIT goes first (for copies of a checkout without its history), then what `git archive` wrote
    into commit.txt, then git, if this is a checkout and not merely a folder inside one.
    """
    told = os.environ.get("TEAL_COMMIT", "").strip()
    archived = (_PACKAGE / "commit.txt").read_text(encoding="utf-8").strip()
    if told or not archived.startswith("$"):
        return told or archived
    root, git = _PACKAGE.parent, shutil.which("git")
    if git is None or not (root / ".git").exists():  # a folder, or in a work tree a file
        return None
    describe = [git, "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(  # noqa: S603 (no word of it comes from outside)
            describe, cwd=root, capture_output=True, text=True, timeout=_GIT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):  # such as a checkout of another user, which git does not read
        return None
    return answer.stdout.strip()


def now() -> str:
    """The time, as results and artefacts carry it: UTC, to the second, such as 2026-01-31T12:00:00+00:00."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _cpu_name() -> str:
    """The processor's marketing name where Linux tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def device_description(device: Any) -> str:
    """The device of a result, in words.

    Args:
        device: a torch.device.
    """
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {torch.get_num_threads()} threads"
