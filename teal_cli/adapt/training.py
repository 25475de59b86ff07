"""How a stage is trained, and what is held over stages and over a kill."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

Figures = dict[str, float]


@dataclass
class Held:
    """What a run carries from stage to stage and over a kill."""

    key: str
    """Digest of all that the run depends on."""
    stage: int = 0
    """Number of the stage under way."""
    curve: list[Figures] = field(default_factory=list)
    """What was logged, in order."""
    best: Figures = field(default_factory=dict)
    """`step` and `loss` of the best weights of this stage; empty before the first."""
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    worse: int = 0
    """Evaluations since then."""
    stopped: bool = False
    """Whether the stage ended early."""
    measured: Mapping[str, Tensor] = field(default_factory=dict)
    """What the recipe measured before its surgery."""
    done: dict[str, Tensor] = field(default_factory=dict)
    """What earlier stages trained, by name."""

    def as_json(self) -> dict[str, Any]:
        """All but the tensors."""
        kept = ("key", "stage", "curve", "best", "worse", "stopped")
        return {name: getattr(self, name) for name in kept}


@dataclass(frozen=True)
class Plan:
    """How a stage is trained."""

    folder: Path
    """Of the run's state."""
    batch_size: int
    """Sequences of one pass, over all processes."""
    processes: int
    accumulate: int
    """Passes a step."""
    learning_rate: float
    warmup: float
    """Share of the steps."""
    schedule: str
    clip: float
    bf16: bool
    on_cpu: bool
    log_every: int
    evaluate_every: int
    save_seconds: float
    """Least time between two checkpoints; each is written where the model is evaluated."""
    patience: int
    """Evaluations without a better one after which a stage ends; 0: never."""
    seed: int
