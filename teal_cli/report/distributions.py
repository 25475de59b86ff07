"""The plots of what was calibrated: how |x| is distributed at the sites, and where the thresholds lie in it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from teal_cli.calibration import histogram
from teal_cli.checkpoint.calibration import Calibration
from teal_cli.checkpoint.rules import Threshold
from teal_cli.report.drawing import GRID, INK, MUTED, Plot, label, name_of, series
from teal_cli.report.inputs import Export
from teal_cli.report.layers import layer_label, places_of, short_name, site_kind

_STEPS = 8
"""Points of a density to each doubling of |x|."""
_OUTERMOST = 1e-3
"""Share of a site's values that may lie outside of the plot at either end; values that are 0 always do."""
SHOWN_EXPORTS = 6
"""Whose thresholds a plot has room for."""


@dataclass(frozen=True)
class _Site:
    """One hidden state."""

    layer: str
    """Empty for one outside of any layer."""
    x: list[float]
    density: list[float]
    """Share of the values to a doubling of |x|, per cent."""
    ends: tuple[float, float]
    """Between which nearly all values lie."""


def distribution_plots(calibration: Calibration, exports: Sequence[Export]) -> list[Plot]:
    """One plot a kind of site: densities of all layers, three of them told apart, above the exports' thresholds."""
    kinds: dict[str, list[_Site]] = {}
    names = list(dict.fromkeys(projection.site for projection in calibration.projections))
    places = places_of(names)
    several = len({place.stack for place in places.values()}) > 1
    for name in names:
        place = places.get(name)
        layer = "" if place is None else f"layer {layer_label(place.stack, place.layer, several)}"
        kinds.setdefault(site_kind(name), []).append(_site(layer, calibration.histograms[name]))
    plots = []
    for kind, sites in kinds.items():
        lanes = _lanes(kind, calibration, exports[:SHOWN_EXPORTS])
        alt = f"Density of |x| at {len(sites)} hidden states {kind}, on a logarithmic axis. " + " ".join(
            f"Thresholds of {lane.label}, {lane.projections}: {min(lane.thresholds):.3g} to {max(lane.thresholds):.3g}."
            for lane in lanes
        )
        height = 2.5 + 0.22 * len(lanes)
        title = kind.replace("_", " ")
        if len(exports) > SHOWN_EXPORTS:
            title += f", thresholds of {SHOWN_EXPORTS} of {len(exports)} exports"
        plots.append(Plot(name_of("distribution", kind), title, alt, height, _drawer(sites, lanes)))
    return plots


def _site(layer: str, counts: Tensor) -> _Site:
    regular = counts[1 : histogram.BINS - 1]
    total = max(int(counts.sum()), 1)
    # Bins are equally wide within a doubling, on a logarithmic axis they are not.
    edges = [math.log2(1 + step / _STEPS) for step in range(_STEPS + 1)]
    shares = (regular.view(-1, _STEPS, histogram.BINS_PER_DOUBLING // _STEPS).sum(2) / total).tolist()
    below = regular.cumsum(0) / max(int(regular.sum()), 1)
    first, last = (int((below < share).sum()) + 1 for share in (_OUTERMOST, 1 - _OUTERMOST))
    ends = (histogram.upper_edge(first), histogram.upper_edge(min(last, histogram.BINS - 2)))
    start = histogram.upper_edge(0)
    x, density = [], []
    for doubling, row in enumerate(shares):
        for step, share in enumerate(row):
            here = start * 2.0 ** (doubling + (edges[step] + edges[step + 1]) / 2)
            if ends[0] / 4 < here < ends[1] * 4:  # the axis shows no more
                x.append(here)
                density.append(100 * share / (edges[step + 1] - edges[step]))
    return _Site(layer, x, density, ends)


@dataclass(frozen=True)
class _Lane:
    """The thresholds of one export for projections that share theirs."""

    label: str
    projections: str
    thresholds: list[float]
    """One a layer."""
    first: bool
    """Whether the label is to be written."""
    look: int


def _lanes(kind: str, calibration: Calibration, exports: Sequence[Export]) -> list[_Lane]:
    readers = [projection for projection in calibration.projections if site_kind(projection.site) == kind]
    places = places_of(projection.name for projection in calibration.projections)
    kinds = {projection.name: short_name(projection.name, places) for projection in readers}
    names = list(dict.fromkeys(kinds.values()))
    lanes = []
    for export in exports:
        of_name: dict[str, tuple[float, ...]] = {}
        for name in names:
            rules = [export.plan.projections.get(reader) for reader, kind in kinds.items() if kind == name]
            of_name[name] = tuple(rule.threshold for rule in rules if isinstance(rule, Threshold))
        together: dict[tuple[float, ...], list[str]] = {}
        for name, thresholds in of_name.items():
            if any(thresholds):
                together.setdefault(thresholds, []).append(name)
        for index, (thresholds, sharing) in enumerate(together.items()):
            look = names.index(sharing[0])
            lanes.append(_Lane(export.label, ", ".join(sharing), list(thresholds), index == 0, look))
    return lanes


def _drawer(sites: Sequence[_Site], lanes: Sequence[_Lane]) -> Callable[[Any], None]:
    told_apart = sorted({0, len(sites) // 2, len(sites) - 1})

    def draw(figure: Any) -> None:
        if lanes:
            density, strip = figure.subplots(2, 1, sharex=True, height_ratios=[2.0, 0.22 * len(lanes)])
            _draw_thresholds(strip, lanes)
        else:
            density = figure.subplots()
        lowest = density if not lanes else strip
        for index, site in enumerate(sites):
            if index not in told_apart:
                density.plot(site.x, site.density, color=MUTED, linewidth=0.6, alpha=0.35)
        for number, index in enumerate(told_apart):
            look = {**series(number), "marker": ""}
            density.plot(sites[index].x, sites[index].density, label=label(sites[index].layer), **look)
        density.set_xscale("log")
        density.set_xlim(min(site.ends[0] for site in sites), max(site.ends[1] for site in sites))
        density.set_ylim(bottom=0)
        density.set_ylabel("% of values\nper doubling")
        density.grid(color=GRID, linewidth=0.6)
        if any(site.layer for site in sites):
            density.legend(loc="upper left", title=f"of {len(sites)}", title_fontsize=9, alignment="left")
        lowest.set_xlabel("|x|")

    return draw


def _draw_thresholds(axes: Any, lanes: Sequence[_Lane]) -> None:
    """A lane a row: a tick for each layer, a marker at the median."""
    for row, lane in enumerate(lanes):
        look = series(lane.look)
        ordered = sorted(value for value in lane.thresholds if value > 0)
        axes.plot(ordered, [row] * len(ordered), "|", color=look["color"], markersize=8, markeredgewidth=0.8)
        axes.plot([ordered[len(ordered) // 2]], [row], look["marker"], color=look["color"], markersize=6)
        place = {"xycoords": ("axes fraction", "data"), "ha": "left", "va": "center", "fontsize": 8}
        axes.annotate(label(lane.projections), (0.01, row), color=look["color"], **place)
        if lane.first and row:
            axes.axhline(row - 0.5, color=GRID, linewidth=0.6)
    axes.set_yticks([row for row, lane in enumerate(lanes) if lane.first])
    axes.set_yticklabels([label(lane.label.replace(",", "")) for lane in lanes if lane.first], fontsize=8, color=INK)
    axes.set_ylim(len(lanes) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=GRID, linewidth=0.6)
