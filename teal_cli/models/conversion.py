"""Weights in other forms, converted once into ordinary transformers folders under TEAL_HOME."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from teal_cli.atomic import atomic_folder
from teal_cli.errors import MachineError
from teal_cli.models.weights import weight_files
from teal_cli.resources import teal_home

ELSEWHERE = "use a smaller model, or run it once on a larger machine and copy what TEAL_HOME/models has there"
"""What to do where memory does not allow a conversion."""

_VERSION = 2
"""To be raised when a conversion writes something else than before: earlier folders are then not taken again."""
_LONGEST_STEM = 100


def conversion_folder(stem: str, content: str) -> Path:
    """Where a conversion belongs.

    Args:
        stem: what it is called.
        content: tells everything that it is made from; with the version of the conversion it makes the digest.
    """
    digest = hashlib.sha256(f"{_VERSION} {content}".encode()).hexdigest()
    return teal_home() / "models" / f"{stem[:_LONGEST_STEM]}-{digest[:16]}"


def converted_once(folder: Path, convert: Callable[[Path], None], announce: Callable[[Path], None]) -> Path:
    """The folder of a conversion, made on first use.

    Safe against two processes (a file lock) and against interruption (the folder appears whole,
    by a rename).

    Args:
        folder: from `conversion_folder`.
        convert: writes into a folder.
        announce: told the folder before.

    Raises:
        MachineError: nothing can be written there.
    """
    if folder.is_dir():
        return folder
    lock = FileLock(str(folder) + ".lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise MachineError(
            f"converted models go to {folder.parent}, which cannot be written ({error.strerror or error}): "
            "set the variable TEAL_HOME to a folder that can"
        ) from error
    try:
        if not folder.is_dir():
            announce(folder)
            with atomic_folder(folder) as temporary:
                convert(temporary)
                weight_files(temporary)
    finally:
        lock.release()
    return folder
