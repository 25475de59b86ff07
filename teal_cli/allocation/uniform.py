"""The same sparsity for every projection (TEAL, arXiv 2408.14690, before its greedy refinement)."""

from teal_cli.checkpoint.calibration import Calibration


def uniform(calibration: Calibration, target: float) -> dict[str, float]:
    """Every projection at the target."""
    return {projection.name: target for projection in calibration.projections}
