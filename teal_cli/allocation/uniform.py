"""The same sparsity for every projection (TEAL, arXiv 2408.14690, before its greedy refinement)."""

from teal_cli.checkpoint.calibration import Calibration


def uniform(calibration: Calibration, target: float) -> dict[str, float]:
    """Every projection of a block at the target, and the output layer dense, as in the paper."""
    return {projection.name: 0.0 if projection.is_output else target for projection in calibration.projections}
