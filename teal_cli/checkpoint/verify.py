"""Whether a TEAL checkpoint is, byte for byte, what it was at its export (`teal inspect --verify`)."""

from pathlib import Path

from teal_cli.checkpoint.digests import file_digests, tensor_digests
from teal_cli.checkpoint.export import check_checkpoint, read_summary
from teal_cli.errors import ArtefactError
from teal_cli.models.weights import weight_files

_NAMED = 5


def verified(folder: Path) -> int:
    """Compare every tensor, and every other file that is loaded, with the digests that teal.json has of them.

    Returns:
        How many were compared.

    Raises:
        ArtefactError: some differ or are missing, or no digests were recorded.
    """
    check_checkpoint(folder)
    summary = read_summary(folder)
    if not summary["tensors"]:
        raise ArtefactError(f"{folder} has no digests of its weights to compare with: export it again")
    tensors, files = tensor_digests(weight_files(folder), again=True), file_digests(folder)
    changed = [
        name
        for made, found in ((summary["tensors"], tensors), (summary["files"], files))
        for name, digest in made.items()
        if found.get(name) != digest
    ]
    if changed:
        more = f" and {len(changed) - _NAMED} more" if len(changed) > _NAMED else ""
        raise ArtefactError(
            f"{folder} is not what was exported: {', '.join(changed[:_NAMED])}{more} changed; export it again"
        )
    return len(summary["tensors"]) + len(summary["files"])
