"""Sparsity where it costs least for what it saves, by measured sensitivities.

Each projection has a curve of cost over sparsity (`calibration.sensitivity`). Costs of projections
add up, to first order, so the cheapest spread for a model-wide saving takes the flattest pieces
first: of every curve's lower convex hull, by cost for what is saved, until enough is saved.
(Lagrange: all projections end at the same marginal cost, but those at a limit.)
"""

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from teal_cli.allocation.cost import Saving, weights_saved
from teal_cli.calibration import sensitivity
from teal_cli.checkpoint.calibration import Calibration
from teal_cli.config_values import MOST_SPARSITY
from teal_cli.errors import UsageError
from teal_cli.models.architectures import Projection


class _Piece(NamedTuple):
    """A straight piece of one projection's hull."""

    slope: float
    """Cost for what is saved."""
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
        if points[-1][0] < share <= MOST_SPARSITY:
            points.append((share, cost))
    return points


def hull(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The lower convex hull of points in rising order of their first number."""
    kept: list[tuple[float, float]] = []
    for x, cost in points:
        while len(kept) >= 2:
            (x_0, cost_0), (x_1, cost_1) = kept[-2:]
            if (cost_1 - cost_0) * (x - x_0) < (cost - cost_0) * (x_1 - x_0):
                break
            kept.pop()
        kept.append((x, cost))
    return kept


def _over_saving(points: list[tuple[float, float]], saving: Saving) -> list[tuple[float, float]]:
    """(saved, cost) of (sparsity, cost), without those that save nothing more."""
    kept = [(0.0, 0.0)]
    for share, cost in points:
        saved = saving.at(share)
        if saved > kept[-1][0]:
            kept.append((saved, cost))
    return kept


def fisher(
    calibration: Calibration,
    target: float,
    *,
    limits: Mapping[str, tuple[float, float]] | None = None,
    savings: Mapping[str, Saving] | None = None,
) -> dict[str, float]:
    """The cheapest spread that saves as much as the target on every projection of a block would.

    Where the calibration has the output layer, it is one place more to save at.

    Args:
        calibration: with sensitivities.
        target: sparsity, in [0, 1).
        limits: projection name -> least and greatest sparsity; 0 to MOST_SPARSITY where none is given.
        savings: what each projection saves; the weights it does not read unless given, so that the
            model-wide sparsity is the target.

    Raises:
        UsageError: a calibration without sensitivities, or a target that curves and limits do not allow.
    """
    if not calibration.sensitivities:
        raise UsageError(
            "this calibration has no sensitivities, which allocation fisher needs: "
            "calibrate again with --sensitivity-tokens above 0, or take another --allocation"
        )
    limits = limits or {}
    savings = savings or weights_saved(calibration.projections)
    missing = wanted = sum(savings[p.name].at(target) for p in calibration.projections if not p.is_output)
    pieces, saved = [], {}
    for projection in calibration.projections:
        name, saving = projection.name, savings[projection.name]
        least, most = (saving.at(limit) for limit in limits.get(name, (0.0, MOST_SPARSITY)))
        saved[name] = least
        missing -= least
        points = curve(calibration.histograms[projection.site], calibration.sensitivities[name])
        for (x_0, cost_0), (x_1, cost_1) in itertools.pairwise(hull(_over_saving(points, saving))):
            start, stop = max(x_0, least), min(x_1, most)
            if start < stop:
                pieces.append(_Piece((cost_1 - cost_0) / (x_1 - x_0), name, start, stop))
    if missing < -1e-6 * wanted:
        raise UsageError(f"the limits (flag --limits) ask for more than sparsity {target:g} already")
    for piece in sorted(pieces):
        if missing <= 0.0:
            break
        taken = min(piece.stop - piece.start, missing)
        saved[piece.name] = piece.start + taken
        missing -= taken
    if missing > 1e-6 * wanted:
        within = " within the limits (flag --limits)" if limits else f": it takes no projection above {MOST_SPARSITY}"
        raise UsageError(f"allocation fisher does not reach sparsity {target:g}{within}")
    return {name: savings[name].sparsity_for(value) for name, value in saved.items()}


def fisher_site(calibration: Calibration, target: float) -> dict[str, float]:
    """`fisher` with one sparsity a site, at the sum of its projections' costs.

    What reads one hidden state then drops the same inputs, which the CPU backend needs to compute it as
    one product. It costs quality: the parts of a site are not equally sensitive.

    Raises:
        UsageError: as `fisher`.
    """
    sites: dict[str, Projection] = {}
    costs: dict[str, Tensor] = {}
    for projection in calibration.projections:
        site, outputs = projection.site, projection.out_features
        before = sites.get(site)
        sites[site] = replace(projection, name=site, out_features=outputs + (before.out_features if before else 0))
        if calibration.sensitivities:
            costs[site] = calibration.sensitivities[projection.name] + costs.get(site, 0.0)
    found = fisher(replace(calibration, projections=list(sites.values()), sensitivities=costs), target)
    return {projection.name: found[projection.site] for projection in calibration.projections}
