"""Places to write to, tried before the work: what cannot be written is said at once, and not after hours."""

import errno
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from teal_cli.errors import UsageError


def check_file(path: Path) -> None:
    """Try whether a file can be written; nothing stays.

    A file is written beside its place and renamed (`atomic`), so that only an ordinary one can be replaced.

    Raises:
        ValueError: why not.
    """
    found = _status(path)
    if found is not None and stat.S_ISDIR(found.st_mode):
        raise ValueError("this is a folder, give a file")
    if found is not None and not stat.S_ISREG(found.st_mode):
        raise ValueError("this is no ordinary file")
    _try(path.parent, path.name)


def check_folder(path: Path) -> None:
    """Try whether a folder can be made, and files written in it; nothing stays.

    Raises:
        ValueError: why not.
    """
    _try(path, "x")


def require(check: Callable[[Path], None], path: Path) -> None:
    """`check_file` or `check_folder` of a place that no flag names.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        check(path)
    except ValueError as error:
        raise UsageError(f"{path}: {error}; write elsewhere (flags --runs, --out)") from error


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"it cannot be written ({error.strerror})") from error


def _try(folder: Path, name: str) -> None:
    """Write a file of this name in the folder, or in the nearest one above that is there."""
    missing = []
    while (found := _status(folder)) is None:
        missing.append(folder.name)
        folder = folder.parent
    if not stat.S_ISDIR(found.st_mode):
        raise ValueError(f"it cannot be written ({folder} is no folder)")
    try:
        most = os.pathconf(folder, "PC_NAME_MAX")
        if any(len(os.fsencode(name)) > most for name in missing):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        with tempfile.NamedTemporaryFile(prefix=f".{name}.", suffix=".part", dir=folder) as stream:
            stream.write(b"x")
    except OSError as error:
        raise ValueError(f"it cannot be written in {folder} ({error.strerror})") from error
