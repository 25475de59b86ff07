"""The files beside a model's weights that are copied with it."""

from pathlib import Path

from teal_cli.errors import ArtefactError

_MOST_COMPANION_BYTES = 256 << 20
"""The largest tokenizers have some 40 MB."""
_MADE_BY_TEAL = "teal.json"


def companion_files(folder: Path, *, with_index: bool) -> list[Path]:
    """Tokenizer, generation config and the like: every small text file but config.json.

    Args:
        folder: a model's.
        with_index: the index of sharded weights too, where these stay as they are.

    Raises:
        ArtefactError: one is no ordinary file, too large, or a link that leads out of the model (but for the links of
            the hub's cache): copying it could give away what does not belong to the model.
    """
    wanted = {".json", ".jinja", ".txt", ".model", ".md"}
    skipped = {"config.json", _MADE_BY_TEAL, *([] if with_index else ["model.safetensors.index.json"])}
    found = [file for file in sorted(folder.iterdir()) if file.suffix in wanted and file.name not in skipped]
    files = [file for file in found if not file.is_dir()]
    inside = (folder.resolve(), folder.resolve().parent.parent / "blobs")
    for file in files:
        if not file.is_file():
            raise ArtefactError(f"{file} is not an ordinary file, or a link to nothing: remove it")
        if file.stat().st_size > _MOST_COMPANION_BYTES:
            raise ArtefactError(f"{file} has more than {_MOST_COMPANION_BYTES:,} bytes: it is no part of a model")
        if not any(file.resolve().is_relative_to(place) for place in inside):
            raise ArtefactError(f"{file} is a link that leads out of the model's folder: put a copy of the file there")
    return files
