"""Spreading a model-wide sparsity over the projections.

An allocation is a function from a calibration and a target to the sparsity of each projection. It
is pure: it neither loads a model nor reads a file. New ones are an entry in ALLOCATIONS and a name
in `config_values.ALLOCATION_NAMES`. A file with every projection's sparsity is an allocation too.
"""

from collections.abc import Callable
from pathlib import Path

from teal_cli.allocation.allocation_file import by_pattern, read_allocation
from teal_cli.allocation.cost import time_saved
from teal_cli.allocation.fisher import fisher, fisher_site
from teal_cli.allocation.greedy import greedy
from teal_cli.allocation.uniform import uniform
from teal_cli.checkpoint.calibration import Calibration
from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.checkpoint.rules import threshold_rule
from teal_cli.config_values import Limits, is_allocation_file
from teal_cli.errors import UsageError, nearest, shown
from teal_cli.models.architectures import block_weights

Allocation = Callable[[Calibration, float], dict[str, float]]
"""(calibration, model-wide target) -> projection name -> sparsity in [0, 1)."""

ALLOCATIONS: dict[str, Allocation] = {
    "uniform": uniform,
    "greedy": greedy,
    "fisher": fisher,
    "fisher-site": fisher_site,
}


def make_plan(
    calibration: Calibration,
    target: float | None,
    allocation: str,
    *,
    limits: Limits | None = None,
    cost: Path | None = None,
) -> SparsityPlan:
    """Sparsity and threshold of every projection.

    Args:
        calibration: histograms of the model.
        target: model-wide sparsity, in [0, 1): weights not read over the weights of the blocks' projections
            (`models.architectures.block_weights`). With `cost`, as fast as this on each of those would be. None with
            a file, which says itself.
        allocation: a name in ALLOCATIONS, or an allocation file.
        limits: pattern of projection names -> least and greatest sparsity; for fisher.
        cost: a result of `teal bench --kernels --json`, to buy time in place of bytes; for fisher.

    Raises:
        UsageError: unknown allocation, a target outside [0, 1), or one that the allocation cannot give.
        ArtefactError: a histogram that cannot give the threshold, or a table without the model's products.
    """
    if is_allocation_file(allocation):
        path = Path(allocation)
        sparsity = read_allocation(path, calibration.projections)
        target, allocation = _agreed(_model_wide(calibration, sparsity), target, path), path.name
    elif target is None or not 0.0 <= target < 1.0:
        raise UsageError(f"sparsity must be at least 0 and below 1, got {target}")
    elif allocation not in ALLOCATIONS:
        raise UsageError(f"unknown allocation {shown(allocation)}{nearest(allocation, ALLOCATIONS)}")
    elif allocation == "fisher":
        sparsity = fisher(
            calibration,
            target,
            limits=by_pattern(limits or {}, calibration.projections, "limits (flag --limits)"),
            savings=None if cost is None else time_saved(cost, calibration.projections),
        )
    else:
        sparsity = ALLOCATIONS[allocation](calibration, target)
    return SparsityPlan(
        allocation=allocation,
        target_sparsity=target,
        projections={
            projection.name: threshold_rule(
                calibration.threshold(projection, sparsity[projection.name]), sparsity[projection.name]
            )
            for projection in calibration.projections
        },
    )


def _model_wide(calibration: Calibration, sparsity: dict[str, float]) -> float:
    projections = calibration.projections
    return sum(sparsity[p.name] * p.weights_read for p in projections) / block_weights(projections)


def _agreed(own: float, target: float | None, path: Path) -> float:
    """A file's own sparsity, unless another was asked for."""
    if own >= 1.0:
        raise UsageError(f"allocation file {path} drops {own:.3f} of the blocks' weights, the output layer's with them")
    if target is not None and abs(target - own) > 5e-4:
        raise UsageError(
            f"allocation file {path} drops {own:.3f} of the model, not {target:g}: leave out sparsity "
            "(flag --sparsity), or edit the file"
        )
    return round(own, 4)
