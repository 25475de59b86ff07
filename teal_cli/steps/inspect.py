"""Inspect: what a run folder or a TEAL checkpoint holds, from its files alone."""

from pathlib import Path
from typing import Any

from teal_cli.report.contents import describe
from teal_cli.report.material import read_material


def inspect(folder: Path, *, verify: bool = False) -> dict[str, Any]:
    """The contract of `teal inspect --json` (docs/formats.md).

    Args:
        folder: a run folder or a TEAL checkpoint.
        verify: read every byte of the weights and compare digests.

    Raises:
        ArtefactError: neither of the two, or damaged.
    """
    return describe(read_material(folder))
