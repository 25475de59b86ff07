"""Inspect: what a run folder or a TEAL checkpoint holds, from its files alone."""

from pathlib import Path
from typing import Any

from teal_cli.checkpoint.verify import verified
from teal_cli.console import QUIET, Reporter
from teal_cli.report.contents import describe
from teal_cli.report.inputs import read_material


def inspect(folder: Path, *, verify: bool = False, reporter: Reporter = QUIET) -> dict[str, Any]:
    """The contract of `teal inspect --json` (docs/formats.md).

    Args:
        folder: RUN, or a TEAL checkpoint.
        verify: read every byte of the checkpoints and compare digests.
        reporter: told which files are left out, and which checkpoints are what they were.

    Raises:
        ArtefactError: neither of the two, damaged, or not what it was at the export.
    """
    material = read_material(folder, say=reporter.say)
    if verify:
        for export in material.exports:
            reporter.say(f"{export.folder}: {verified(export.folder)} tensors and files are what they were")
    return describe(material)
