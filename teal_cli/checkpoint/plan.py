"""The sparsity plan: every projection's rule of skipping, as config.json carries it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from teal_cli.atomic import check_seal, sealed
from teal_cli.checkpoint.fields import Amount, Content, Name, Share, Size, Sparsity, checked
from teal_cli.checkpoint.rules import ROUTED, ZEROS, Routed, Rule, Zeros, threshold_rule
from teal_cli.errors import ArtefactError, shown
from teal_cli.models.architectures import Architecture
from teal_cli.models.config_checks import QUANT_METHOD
from teal_cli.schemes import Scheme

FORMAT_VERSION = 1
QUANTISED_VERSION = 2
"""Of a checkpoint whose weights are quantised."""
ZEROS_VERSION = 3
"""Of a checkpoint with a projection that skips exact zeros, quantised or not: older readers must refuse it."""
ROUTED_VERSION = 4
"""Of a checkpoint with a router in front of an MLP: without routers it is another model."""
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


_NEEDED_BY = {"sparsity": (None, ROUTED), "threshold": (None,), "group": (ROUTED,)}
"""Which rules of a file a field may not be missing in, nor null."""


class StoredRule(Content):
    """A rule in a file: sparsity and threshold (dense where the sparsity is 0), zeros, whose sparsity may be null, or
    routed, with the size of groups and the rank of the router, which may be null.

    Thresholds have no `rule`, as in files from before there were other rules.
    """

    rule: Literal["zeros", "routed"] | None = None
    sparsity: Sparsity | None
    threshold: Annotated[Amount | None, Field(validate_default=True)] = None
    group: Annotated[Size | None, Field(validate_default=True)] = None
    rank: Size | None = None

    @field_validator("sparsity", "threshold", "group")
    @classmethod
    def _of_its_rule(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is None and "rule" in info.data and info.data["rule"] in _NEEDED_BY[str(info.field_name)]:
            raise PydanticCustomError("missing", "Field required")
        return value

    def to_rule(self) -> Rule:
        """What it says."""
        if self.rule == ZEROS:
            return Zeros(self.sparsity)
        if self.rule == ROUTED:
            assert self.group is not None and self.sparsity is not None  # noqa: PT018, S101  # the validator's word
            return Routed(self.group, self.rank, self.sparsity)
        assert self.threshold is not None and self.sparsity is not None  # noqa: PT018, S101  # the validator's word
        return threshold_rule(self.threshold, self.sparsity)

    def stored(self) -> dict[str, Any]:
        """As it was written, with the threshold that a dense projection may have."""
        if self.rule == ZEROS:
            return {"rule": ZEROS, "sparsity": self.sparsity}
        if self.rule == ROUTED:
            return self.to_rule().stored()
        return {"sparsity": self.sparsity, "threshold": self.threshold}


class _Quantization(Content):
    projections: Annotated[Name, AfterValidator(_is_scheme)]
    output: Name | None


class _Stored(Content):
    """What is read of a `quantization_config`."""

    allocation: Name
    target_sparsity: Share
    projections: Annotated[dict[Name, StoredRule], Field(min_length=1)]
    quantization: _Quantization | None = None
    architecture: Architecture | None = None


@dataclass(frozen=True)
class SparsityPlan:
    """By which rule each projection skips inputs."""

    allocation: str
    target_sparsity: float
    projections: dict[str, Rule]
    """Module path -> rule."""

    def to_dict(self) -> dict[str, Any]:
        """The `quantization_config` of a TEAL checkpoint."""
        version = ROUTED_VERSION if self.is_routed else ZEROS_VERSION if self.has_zeros else FORMAT_VERSION
        return {"quant_method": QUANT_METHOD, "version": version, **self._stored(), "sha256": self.digest()}

    @property
    def has_zeros(self) -> bool:
        """Whether a projection skips exact zeros."""
        return any(isinstance(rule, Zeros) for rule in self.projections.values())

    @property
    def is_routed(self) -> bool:
        """Whether a router is in front of an MLP."""
        return any(isinstance(rule, Routed) for rule in self.projections.values())

    def allocation_yaml(self) -> str:
        """The sparsities alone, as a file for --allocation. It has no line for what the model itself leaves out."""
        sparsities = {
            name: round(rule.expected_sparsity, 6)
            for name, rule in self.projections.items()
            if not isinstance(rule, Zeros | Routed)
        }
        content = {
            "allocation": self.allocation,
            "target_sparsity": self.target_sparsity,
            "projections": sparsities,
        }
        head = "# The share of inputs that each projection drops. Edit a copy and hand it back: --allocation FILE\n"
        return head + yaml.safe_dump(content, sort_keys=False)

    def _stored(self) -> dict[str, Any]:
        return _content(self.allocation, self.target_sparsity, self.projections)

    def digest(self) -> str:
        """sha256 of the plan, by which a reader notices a change."""
        return _digest(self._stored())

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "SparsityPlan":
        """Read and check a `quantization_config`.

        Raises:
            ArtefactError: another version, missing keys, values that cannot be, or a change.
        """
        version, expected = content.get("version"), _version_of(content)
        if version != expected:
            raise ArtefactError(
                f"this TEAL checkpoint has format version {shown(version)}, this teal reads {expected}: {_ADVICE}"
            )
        what, where = "the quantization_config of a TEAL checkpoint, in", Path("config.json")
        found = checked(_Stored, content, what, where, _ADVICE)
        if version in (ZEROS_VERSION, ROUTED_VERSION) and found.quantization is not None:
            skipped = "zeros" if version == ZEROS_VERSION else "routed neurons"
            raise ArtefactError(f"this TEAL checkpoint has {skipped} to skip in quantised weights: {_ADVICE}")
        if content.get("sha256") != _digest(
            _content(found.allocation, found.target_sparsity, found.projections)  # of what the file has
        ):
            raise ArtefactError(f"the thresholds of this TEAL checkpoint were altered: {_ADVICE}")
        check_seal(content, what, where, _ADVICE, only=_SEALED)
        rules = {name: entry.to_rule() for name, entry in found.projections.items()}
        return cls(found.allocation, found.target_sparsity, rules)


def _content(allocation: str, target: float, projections: Mapping[str, Rule | StoredRule]) -> dict[str, Any]:
    stored = {name: entry.stored() for name, entry in projections.items()}
    return {"allocation": allocation, "target_sparsity": target, "projections": stored}


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _version_of(content: Mapping[str, Any]) -> int:
    """The format version that a `quantization_config` needs for what it says."""
    projections = content.get("projections")
    entries = projections.values() if isinstance(projections, dict) else ()
    rules = [entry["rule"] for entry in entries if isinstance(entry, dict) and "rule" in entry]
    if rules:
        return ROUTED_VERSION if ROUTED in rules else ZEROS_VERSION
    return QUANTISED_VERSION if "quantization" in content else FORMAT_VERSION


def quantization_config(
    plan: SparsityPlan, quantization: dict[str, Any] | None, architecture: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint, whose weights may be quantised, and whose architecture its own."""
    found = plan.to_dict()
    if quantization is not None:
        if plan.has_zeros or plan.is_routed:
            what = "zeros" if plan.has_zeros else "routed neurons"
            raise ArtefactError(f"{what} are skipped in weights that are not quantised: {_ADVICE} without --quantize")
        found |= {"version": QUANTISED_VERSION, "quantization": quantization}
    if architecture is not None:
        found["architecture"] = architecture
    return sealed(found, only=_SEALED)
