"""adapt.json: how a model was adapted, from which dense model, and what came of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from teal_cli.atomic import check_seal, sealed
from teal_cli.checkpoint.fields import Amount, Content, Count, Digest, Flag, Measure, Moment, Name, Share, checked
from teal_cli.reading import read_json

ADAPTED = "adapt.json"
_ADVICE = "adapt the model again"


class Source(Content):
    """The dense model that was adapted, which results are compared with."""

    model: Name
    """As --model named it."""
    name: Name
    folder: Name
    """Absolute."""
    weights: Digest
    """Fingerprint."""
    configuration: Digest


class TextUsed(Content):
    """One dataset."""

    dataset: Name
    weight: Amount
    tokens: Count
    """Of the text that was had; the run may read it several times, or not all of it."""
    sha256: Digest
    """Of its token numbers, held-out ones last, each as an int64."""


class Quality(Content):
    """On the held-out slice of the training text, against the dense model."""

    perplexity_ratio: Measure
    kl: Measure
    realised_sparsity: Share
    bytes_per_token: Count
    dense_bytes_per_token: Count


class Record(Content):
    """adapt.json."""

    teal_version: Name
    finished: Moment
    recipe: Name
    options: dict[Name, Any]
    settings: dict[Name, Any]
    """The configuration, by YAML keys."""
    source: Source
    """What results are compared with: the model that never was adapted."""
    parent: Source | None = None
    """The model that was trained, where it had been adapted before."""
    text: list[TextUsed]
    repeats: Amount
    """How often the text was read, where it was read most often."""
    tokens: Count
    """That were trained on: fewer than asked for where the run stopped early."""
    steps: Count
    stopped_early: Flag
    best: dict[Name, Measure]
    """`step` and `loss` of the weights that were kept; empty where these are the last."""
    parameters: Count
    """That were trained."""
    seconds: Amount
    device: Name
    dtype: Name
    versions: dict[Name, Name]
    curve: list[dict[Name, Measure]] = Field(default_factory=list)
    before: Quality | None = None
    """Training-free: the same rules in the dense model."""
    after: Quality | None = None
    notes: dict[Name, Any] = Field(default_factory=dict)
    """What the recipe says."""


def stored(record: Record) -> dict[str, Any]:
    """The content of adapt.json."""
    return sealed(record.model_dump(mode="json"))


def is_adapted(folder: Path) -> bool:
    """Whether a model folder came out of `teal adapt`, perhaps through an export since."""
    return (folder / ADAPTED).is_file()


def read_record(folder: Path) -> Record:
    """adapt.json of a folder.

    Raises:
        ArtefactError: missing or damaged.
    """
    path = folder / ADAPTED
    content: Mapping[str, Any] = read_json(path, "record of an adapted model")
    check_seal(content, "record of an adapted model", path, _ADVICE)
    return checked(Record, content, "record of an adapted model", path, _ADVICE)
