"""The sparsity plan: every projection's sparsity and threshold, as config.json carries it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, Field

from teal_cli.atomic import check_seal, sealed
from teal_cli.checkpoint.fields import Amount, Content, Name, Share, Sparsity, checked
from teal_cli.errors import ArtefactError, shown
from teal_cli.models.architectures import Architecture
from teal_cli.models.config_checks import QUANT_METHOD
from teal_cli.schemes import Scheme

FORMAT_VERSION = 1
QUANTISED_VERSION = 2
"""Of a checkpoint whose weights are quantised."""
_SEALED = ("version", "allocation", "target_sparsity", "projections", "sha256", "quantization", "architecture")
"""The keys whose change is noticed; transformers may add some of its own."""
_SUMMARY = "teal.json"
_ADVICE = "export it again"


def carries_plan(config: Mapping[str, Any]) -> bool:
    """Whether a model configuration (config.json, parsed) is that of a TEAL checkpoint."""
    stored = config.get("quantization_config")
    return isinstance(stored, dict) and stored.get("quant_method") == QUANT_METHOD


def check_is_whole(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a TEAL checkpoint whose thresholds were lost or damaged, which would pass for a dense model.

    Args:
        folder: of any model.
        config: its config.json.

    Raises:
        ArtefactError: a folder with teal.json and without thresholds, damaged ones, or a `quantization_config` that
            is no mapping.
    """
    stored = config.get("quantization_config")
    if stored is not None and not isinstance(stored, dict):
        raise ArtefactError(f"the quantization_config of {folder}/config.json is no mapping: make the model again")
    if carries_plan(config):
        SparsityPlan.from_dict(config["quantization_config"])
    elif (folder / _SUMMARY).exists():
        raise ArtefactError(
            f"{folder} is a TEAL checkpoint (it has {_SUMMARY}) and its config.json carries no thresholds: {_ADVICE}"
        )


def _is_scheme(text: str) -> str:
    Scheme.parse(text)
    return text


class _Entry(Content):
    sparsity: Sparsity
    threshold: Amount


class _Quantization(Content):
    projections: Annotated[Name, AfterValidator(_is_scheme)]
    output: Name | None


class _Stored(Content):
    """What is read of a `quantization_config`."""

    allocation: Name
    target_sparsity: Share
    projections: Annotated[dict[Name, _Entry], Field(min_length=1)]
    quantization: _Quantization | None = None
    architecture: Architecture | None = None


@dataclass(frozen=True)
class ProjectionPlan:
    """One projection: the sparsity that was asked, and the threshold that gives it."""

    sparsity: float
    threshold: float


@dataclass(frozen=True)
class SparsityPlan:
    """Which projections are sparse and how much."""

    allocation: str
    target_sparsity: float
    projections: dict[str, ProjectionPlan]
    """Module path -> plan."""

    def to_dict(self) -> dict[str, Any]:
        """The `quantization_config` of a TEAL checkpoint."""
        return {"quant_method": QUANT_METHOD, "version": FORMAT_VERSION, **asdict(self), "sha256": self.digest()}

    def allocation_yaml(self) -> str:
        """The sparsities alone, as a file for --allocation."""
        content = {
            "allocation": self.allocation,
            "target_sparsity": self.target_sparsity,
            "projections": {name: round(entry.sparsity, 6) for name, entry in self.projections.items()},
        }
        head = "# The share of inputs that each projection drops. Edit a copy and hand it back: --allocation FILE\n"
        return head + yaml.safe_dump(content, sort_keys=False)

    def digest(self) -> str:
        """sha256 of the plan, by which a reader notices a change."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "SparsityPlan":
        """Read and check a `quantization_config`.

        Raises:
            ArtefactError: another version, missing keys, values that cannot be, or a change.
        """
        version = content.get("version")
        if version != (QUANTISED_VERSION if "quantization" in content else FORMAT_VERSION):
            raise ArtefactError(
                f"this TEAL checkpoint has format version {shown(version)}, this teal reads {FORMAT_VERSION}: {_ADVICE}"
            )
        what, where = "the quantization_config of a TEAL checkpoint, in", Path("config.json")
        found = checked(_Stored, content, what, where, _ADVICE)
        plan = cls(
            found.allocation,
            found.target_sparsity,
            {name: ProjectionPlan(entry.sparsity, entry.threshold) for name, entry in found.projections.items()},
        )
        if content.get("sha256") != plan.digest():
            raise ArtefactError(f"the thresholds of this TEAL checkpoint were altered: {_ADVICE}")
        check_seal(content, what, where, _ADVICE, only=_SEALED)
        return plan


def quantization_config(
    plan: SparsityPlan, quantization: dict[str, Any] | None, architecture: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint, whose weights may be quantised, and whose architecture its own."""
    found = plan.to_dict()
    if quantization is not None:
        found |= {"version": QUANTISED_VERSION, "quantization": quantization}
    if architecture is not None:
        found["architecture"] = architecture
    return sealed(found, only=_SEALED)
