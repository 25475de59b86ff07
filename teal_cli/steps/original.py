"""The dense model that an adapted one came from, which its quality is compared with."""

from pathlib import Path

from teal_cli.checkpoint.adapted import Source, is_adapted, read_record
from teal_cli.console import Reporter
from teal_cli.errors import TealError
from teal_cli.model_source import find_model
from teal_cli.models.weights import fingerprint


def original_of(folder: Path, reporter: Reporter) -> tuple[Source, Path] | None:
    """What an adapted model is compared with; None of other models, and where it is not found, which is said.

    Args:
        folder: of any model.
        reporter: told where the original is no more.

    Raises:
        ArtefactError: adapt.json is damaged.
    """
    if not is_adapted(folder):
        return None
    source = read_record(folder).source
    for place in (Path(source.folder), None):
        try:
            found = find_model(source.model).folder if place is None else place
            if fingerprint(found) == source.weights:
                return source, found
        except (TealError, OSError):
            continue
    reporter.say(
        f"the model that {folder.name} was adapted from is neither in {source.folder} nor called {source.model} any "
        "more: compared with the adapted model's own dense self"
    )
    return None
