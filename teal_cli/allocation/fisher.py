"""Sparsity where it costs least for the bytes that it saves, by measured sensitivities.

Each projection has a curve of cost over sparsity (`calibration.sensitivity`). Costs of projections
add up, to first order, so the cheapest spread for a model-wide sparsity takes the flattest pieces
first: of every curve's lower convex hull, by cost per weight that is not read, until enough is
dropped. (Lagrange: all projections end at the same marginal cost.)
"""

import itertools
from typing import NamedTuple

from torch import Tensor

from teal_cli.calibration import sensitivity
from teal_cli.checkpoint.calibration import Calibration
from teal_cli.errors import UsageError

_MOST = 0.99
"""Sparsity of one projection at which its curve ends: beyond, a handful of inputs decide."""


class _Piece(NamedTuple):
    """A straight piece of one projection's hull."""

    slope: float
    """Cost for each weight that is not read."""
    name: str
    start: float
    stop: float


def curve(counts: Tensor, squares: Tensor) -> list[tuple[float, float]]:
    """(sparsity, cost) at every threshold that changes the sparsity, from (0, 0) on.

    Args:
        counts: (histogram.BINS,) int64 of the projection's site.
        squares: (sensitivity.BINS,) float64 of the projection.
    """
    total = int(counts.sum())
    below = counts.cumsum(0)
    points = [(0.0, 0.0)]
    for edge, cost in zip(sensitivity.edges(), squares.tolist(), strict=True):
        share = int(below[edge]) / total
        if points[-1][0] < share <= _MOST:
            points.append((share, cost))
    return points


def hull(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The lower convex hull of points in rising order of sparsity."""
    kept: list[tuple[float, float]] = []
    for s, cost in points:
        while len(kept) >= 2:
            (s_0, cost_0), (s_1, cost_1) = kept[-2:]
            if (cost_1 - cost_0) * (s - s_0) < (cost - cost_0) * (s_1 - s_0):
                break
            kept.pop()
        kept.append((s, cost))
    return kept


def fisher(calibration: Calibration, target: float) -> dict[str, float]:
    """The cheapest spread of the target.

    Raises:
        UsageError: a calibration without sensitivities, or a target that the curves do not reach.
    """
    if not calibration.sensitivities:
        raise UsageError(
            "this calibration has no sensitivities, which allocation fisher needs: "
            "calibrate again with --sensitivity-tokens above 0, or take another --allocation"
        )
    weights = {projection.name: projection.parameters for projection in calibration.projections}
    pieces = []
    for projection in calibration.projections:
        points = hull(curve(calibration.histograms[projection.site], calibration.sensitivities[projection.name]))
        for (s_0, cost_0), (s_1, cost_1) in itertools.pairwise(points):
            slope = (cost_1 - cost_0) / ((s_1 - s_0) * projection.parameters)
            pieces.append(_Piece(slope, projection.name, s_0, s_1))
    missing = target * sum(weights.values())
    sparsity = dict.fromkeys(weights, 0.0)
    for piece in sorted(pieces):
        if missing <= 0.0:
            break
        taken = min(piece.stop - piece.start, missing / weights[piece.name])
        sparsity[piece.name] = piece.start + taken
        missing -= taken * weights[piece.name]
    if missing > 1e-6 * sum(weights.values()):
        raise UsageError(f"allocation fisher does not reach sparsity {target:g}: it takes no projection above {_MOST}")
    return sparsity
