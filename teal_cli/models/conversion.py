"""Weights in other forms, converted once into ordinary transformers folders under TEAL_HOME."""

from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from teal_cli.checkpoint.files import atomic_folder
from teal_cli.checkpoint.weights import weight_files
from teal_cli.resources import teal_home

ELSEWHERE = "use a smaller model, or run it once on a larger machine and copy what TEAL_HOME/models has there"
"""What to do where memory does not allow a conversion."""


def converted_once(name: str, convert: Callable[[Path], None], announce: Callable[[Path], None]) -> Path:
    """The folder of a conversion, made on first use.

    Safe against two processes (a file lock) and against interruption (the folder appears whole,
    by a rename).

    Args:
        name: of the folder; says what was converted.
        convert: writes into a folder.
        announce: told the folder before.
    """
    folder = teal_home() / "models" / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(folder) + ".lock"):
        if not folder.is_dir():
            announce(folder)
            with atomic_folder(folder) as temporary:
                convert(temporary)
                weight_files(temporary)
    return folder
