"""Where the packaged data lies, and where teal keeps its own files."""

import os
from importlib.resources import files
from pathlib import Path

CONFIGS = Path(str(files("teal_cli") / "configs"))
"""The repository's configs/ folder, inside the package."""


def teal_home() -> Path:
    """`$TEAL_HOME`, or ~/.cache/teal: converted models. Not created here."""
    named = Path(os.environ.get("TEAL_HOME") or Path.home() / ".cache" / "teal")
    try:
        return named.expanduser()
    except RuntimeError:  # ~ of nobody
        return named
