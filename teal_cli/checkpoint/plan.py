"""The sparsity plan: every projection's sparsity and threshold, as config.json carries it."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from teal_cli.errors import ArtefactError

FORMAT_VERSION = 1
QUANTISED_VERSION = 2
"""Of a checkpoint whose weights are quantised."""
QUANT_METHOD = "teal"
"""The name under which transformers knows the format."""


def carries_plan(config: dict[str, Any]) -> bool:
    """Whether a model configuration (config.json, parsed) is that of a TEAL checkpoint."""
    return (config.get("quantization_config") or {}).get("quant_method") == QUANT_METHOD


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
            ArtefactError: another version, missing keys, or values that cannot be.
        """
        version = content.get("version")
        if version != (QUANTISED_VERSION if "quantization" in content else FORMAT_VERSION):
            raise ArtefactError(
                f"this TEAL checkpoint has format version {version!r}, this teal reads {FORMAT_VERSION}: "
                "export it again"
            )
        try:
            plan = cls(
                allocation=str(content["allocation"]),
                target_sparsity=float(content["target_sparsity"]),
                projections={
                    str(name): ProjectionPlan(float(entry["sparsity"]), float(entry["threshold"]))
                    for name, entry in content["projections"].items()
                },
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtefactError(
                f"the thresholds of this TEAL checkpoint are damaged ({error!r}): export it again"
            ) from error
        plan.check()
        if content.get("sha256") != plan.digest():
            raise ArtefactError("the thresholds of this TEAL checkpoint were altered: export it again")
        return plan

    def check(self) -> None:
        """Refuse values that cannot be.

        Raises:
            ArtefactError: no projections, or a sparsity or threshold out of range.
        """
        if not self.projections:
            raise ArtefactError("this TEAL checkpoint names no projections: export it again")
        for name, entry in self.projections.items():
            if not 0.0 <= entry.sparsity < 1.0:
                raise ArtefactError(f"{name}: sparsity {entry.sparsity} is not in [0, 1): export it again")
            if not (math.isfinite(entry.threshold) and entry.threshold >= 0.0):
                raise ArtefactError(f"{name}: threshold {entry.threshold} is not a number >= 0: export it again")


def quantization_config(
    plan: SparsityPlan, quantization: dict[str, Any] | None, architecture: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint, whose weights may be quantised, and whose architecture its own."""
    found = plan.to_dict()
    if quantization is not None:
        found |= {"version": QUANTISED_VERSION, "quantization": quantization}
    return found if architecture is None else {**found, "architecture": architecture}
