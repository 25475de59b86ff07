"""The rule by which a projection skips inputs: data, of which layers, kernels and files each take what they need.

`threshold` is what a kernel takes: an input with |x| <= threshold is skipped. `expected_sparsity` is an
estimate. It never says whether a projection skips anything: the kind of the rule does.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from teal_kernels import KEEP_ALL

ASSUMED_ZEROS = 0.9
"""Sparsity of a `Zeros` rule that nobody has measured, for choosing a tile config and for nothing else: models that
are trained with ReLU have 85 to 95 % of zeros there (ProSparse, arXiv 2402.13516; Turbo Sparse, arXiv 2406.05955)."""


@dataclass(frozen=True)
class Dense:
    """Nothing is skipped."""

    threshold: ClassVar[float] = KEEP_ALL
    expected_sparsity: ClassVar[float] = 0.0

    def stored(self) -> dict[str, Any]:
        """As files have it."""
        return {"sparsity": 0.0, "threshold": 0.0}


@dataclass(frozen=True)
class Threshold:
    """Inputs up to a threshold are skipped.

    Raises:
        ValueError: a threshold below 0, or an expected sparsity outside (0, 1).
    """

    threshold: float
    expected_sparsity: float
    """Share of inputs that the threshold was chosen to skip."""

    def __post_init__(self) -> None:
        if not (self.threshold >= 0.0 and 0.0 < self.expected_sparsity < 1.0):
            raise ValueError(f"{self}: a threshold is at least 0 and its expected sparsity above 0 and below 1")

    def stored(self) -> dict[str, Any]:
        """As files have it."""
        return {"sparsity": self.expected_sparsity, "threshold": self.threshold}


@dataclass(frozen=True)
class Zeros:
    """Inputs that are exactly zero are skipped, which changes nothing in what is computed.

    Raises:
        ValueError: an expected sparsity outside [0, 1).
    """

    expected_sparsity: float | None = None
    """Share of zeros that was measured; None before anybody has."""
    threshold: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        if self.expected_sparsity is not None and not 0.0 <= self.expected_sparsity < 1.0:
            raise ValueError(f"{self}: an expected sparsity is at least 0 and below 1, or None")

    def stored(self) -> dict[str, Any]:
        """As files have it."""
        return {"rule": ZEROS, "sparsity": self.expected_sparsity}


@dataclass(frozen=True)
class Routed:
    """Groups of neurons that a router leaves out are skipped, in prompts too: without its router the model is another
    function. Of `down`, in front of which their neurons are zero.

    Raises:
        ValueError: a size below 1, or an expected sparsity outside [0, 1).
    """

    group: int
    """Neighbouring neurons that are chosen together; 1: each by itself, as PowerInfer's predictors do."""
    rank: int | None
    """Of a router of two layers with ReLU between; None of one linear layer."""
    expected_sparsity: float
    """Share of groups that were left out on some text."""
    threshold: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        if self.group < 1 or (self.rank is not None and self.rank < 1) or not 0.0 <= self.expected_sparsity < 1.0:
            raise ValueError(f"{self}: group and rank are at least 1, an expected sparsity at least 0 and below 1")

    def stored(self) -> dict[str, Any]:
        """As files have it."""
        return {"rule": ROUTED, "group": self.group, "rank": self.rank, "sparsity": self.expected_sparsity}


Rule = Dense | Threshold | Zeros | Routed
ZEROS = "zeros"
"""How files name `Zeros`."""
ROUTED = "routed"
"""How files name `Routed`, and what stands in place of an allocation where MLPs are routed."""
INTRINSIC = "intrinsic"
"""What stands in place of an allocation where a model skips zeros of its own."""


def threshold_rule(threshold: float, sparsity: float) -> Dense | Threshold:
    """The rule of a projection that is to skip a share of its inputs; of a share of 0 it is dense."""
    return Threshold(threshold, sparsity) if sparsity > 0.0 else Dense()
