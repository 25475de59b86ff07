"""Spreading a model-wide sparsity over the projections.

An allocation is a function from a calibration and a target to the sparsity of each projection. It
is pure: it neither loads a model nor reads a file. New ones are an entry in
ALLOCATIONS and a name in `config.AllocationName`.
"""

from collections.abc import Callable

from teal_cli.allocation.fisher import fisher
from teal_cli.allocation.uniform import uniform
from teal_cli.checkpoint.calibration import Calibration
from teal_cli.checkpoint.plan import ProjectionPlan, SparsityPlan
from teal_cli.errors import UsageError, nearest

Allocation = Callable[[Calibration, float], dict[str, float]]
"""(calibration, model-wide target) -> projection name -> sparsity in [0, 1)."""

ALLOCATIONS: dict[str, Allocation] = {"uniform": uniform, "fisher": fisher}


def make_plan(calibration: Calibration, target: float, allocation: str) -> SparsityPlan:
    """Sparsity and threshold of every projection.

    Args:
        calibration: histograms of the model.
        target: model-wide sparsity, in [0, 1); each projection weighs by its parameters.
        allocation: a name in ALLOCATIONS.

    Raises:
        UsageError: unknown allocation, a target outside [0, 1), or one that the allocation cannot give.
        ArtefactError: a histogram that cannot give the threshold.
    """
    if not 0.0 <= target < 1.0:
        raise UsageError(f"sparsity must be at least 0 and below 1, got {target}")
    if allocation not in ALLOCATIONS:
        raise UsageError(f"unknown allocation {allocation!r}{nearest(allocation, ALLOCATIONS)}")
    sparsity = ALLOCATIONS[allocation](calibration, target)
    return SparsityPlan(
        allocation=allocation,
        target_sparsity=target,
        projections={
            projection.name: ProjectionPlan(
                sparsity=sparsity[projection.name],
                threshold=calibration.threshold(projection, sparsity[projection.name]),
            )
            for projection in calibration.projections
        },
    )
