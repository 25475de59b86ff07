"""The plots of quality and speed over sparsity."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from teal_cli.config_values import ALLOCATION_NAMES
from teal_cli.report.drawing import GRID, MUTED, Plot, label, series
from teal_cli.report.inputs import Material
from teal_cli.report.tables import in_every_pass

_LOGARITHMIC_ABOVE = 5.0
"""Times dense; beyond, a linear axis would hide the differences at the sparsities that matter."""
_NAME_HEIGHT = 0.065
"""Of a line's name, as a share of the axes."""


@dataclass(frozen=True)
class _Line:
    """Values over realised sparsity; `below` and `above` reach from each value to the ends of its bar."""

    label: str
    look: int
    """Which of `series`: one allocation looks alike in all plots."""
    sparsity: list[float]
    values: list[float]
    below: list[float]
    above: list[float]


def quality_plots(material: Material) -> list[Plot]:
    """Perplexity over dense, a line an allocation; one plot for each model, kind of weights, text and dense prefix."""
    looks = _looks(material)
    groups: dict[tuple[str, str, int, int], list[dict[str, Any]]] = {}
    for result, run in material.evaluated():
        content = result.content
        model = result.name_of(result.weights_of(run))
        key = (model, content["dataset"], run["tokens"], run["dense_prefix"])
        groups.setdefault(key, []).append(run)
    plots = []
    for number, ((model, dataset, tokens, prefix), runs) in enumerate(groups.items(), start=1):
        lines = []
        for allocation in dict.fromkeys(run["sparse"]["allocation"] for run in runs):
            points = {0.0: (1.0, 0.0)}
            for run in runs:
                if run["sparse"]["allocation"] == allocation:
                    error = run.get("perplexity_ratio_stderr") or 0.0
                    points[run["sparse"]["realised_sparsity"]] = (run["perplexity_ratio"], error)
            lines.append(_with_errors(allocation, looks[allocation], points))
        title = f"{model} on {dataset}, {tokens:,} tokens"
        if prefix and not all(in_every_pass(run["sparse"]) for run in runs):
            title += f", the first {prefix} of each sequence dense"
        plots.append(
            Plot(
                f"quality-{number}",
                title,
                _alt(f"Perplexity over dense against realised sparsity, {title}.", lines, "{:.3f}"),
                3.4,
                _drawer(lines, "perplexity over dense", digits=2, from_zero=False),
            )
        )
    return [*plots, *_encoder_plots(material, looks)]


def _encoder_plots(material: Material, looks: Mapping[str, int]) -> list[Plot]:
    """Cosine between dense and sparse hidden states, of encoders; one plot a result."""
    plots = []
    for number, result in enumerate(material.of_kind("encoder"), start=1):
        lines = []
        for allocation in dict.fromkeys(run["allocation"] for run in result.runs):
            runs = [run for run in result.runs if run["allocation"] == allocation]
            points = {0.0: (1.0, 0.0)}
            points |= {run["realised_sparsity"]: (run["cosine"], run["cosine_stderr"] or 0.0) for run in runs}
            lines.append(_with_errors(allocation, looks[allocation], points))
        model = result.name_of(result.weights_of(result.runs[0]))
        title = f"{model} on {result.content['dataset']}, {result.runs[0]['tokens']:,} tokens"
        alt = _alt(f"Cosine to the dense hidden states against realised sparsity, {title}.", lines, "{:.3f}")
        draw = _drawer(lines, "cosine to dense", digits=3, from_zero=False)
        plots.append(Plot(f"similarity-{number}", title, alt, 3.4, draw))
    return plots


def _with_errors(name: str, look: int, points: Mapping[float, tuple[float, float]]) -> _Line:
    """A line through (value, standard error) at each sparsity, as far as values are numbers."""
    ordered = sorted((x, point) for x, point in points.items() if math.isfinite(point[0]))
    errors = [error for _, (_, error) in ordered]
    return _Line(name, look, [x for x, _ in ordered], [value for _, (value, _) in ordered], errors, errors)


def speed_plots(material: Material) -> list[Plot]:
    """Tokens a second, a line an allocation, beside what reading the weights would allow; one plot for each set-up."""
    looks = _looks(material)
    groups: dict[tuple[Any, ...], list[list[dict[str, Any]]]] = {}
    for result in material.of_kind("bench"):
        for weights, runs in result.by_weights().items():
            keys = ("dtype", "batch", "device", "prompt_tokens", "new_tokens")
            key = (result.name_of(weights), *(result.content.get(key) for key in keys))
            groups.setdefault(key, []).append(runs)
    plots = []
    for number, ((model, dtype, batch, device, *_), benches) in enumerate(groups.items(), start=1):
        lines: list[_Line] = []
        limits: dict[float, float] = {}
        for bench in benches:
            names = list(dict.fromkeys(run.get("allocation") or "" for run in bench[1:])) or [""]
            for name in names:
                runs = [run for run in bench if run is bench[0] or (run.get("allocation") or "") == name]
                look = _free_look(looks.get(name, 0), lines)
                lines.append(_speed_line(_unused(name or "sparse", lines), look, runs))
            limits |= {
                run["realised_sparsity"]: run["limit_tokens_per_second"]
                for run in bench
                if run.get("limit_tokens_per_second")
            }
        title = f"{model}, {dtype}, batch {batch}, {device}"
        alt = _alt(f"Tokens a second against realised sparsity, {title}.", lines, "{:.1f}")
        if limits:
            alt += " Limit of the memory: " + ", ".join(f"{y:.1f} at {x:.0%}" for x, y in sorted(limits.items())) + "."
        draw = _drawer(lines, "tokens a second", digits=1, from_zero=True, limits=limits)
        plots.append(Plot(f"speed-{number}", title, alt, 3.4, draw))
    return plots


def _looks(material: Material) -> dict[str, int]:
    """Allocation -> its look."""
    found = {str(plan["allocation"]) for _, _, plan in material.measured()}
    found |= {str(run.get("allocation") or "") for result in material.of_kind("bench") for run in result.runs}
    others = sorted(found - {"", *ALLOCATION_NAMES})
    return {name: index for index, name in enumerate([*ALLOCATION_NAMES, *others])}


def _free_look(wanted: int, lines: Sequence[_Line]) -> int:
    """The wanted look, or the next one that no line of the plot has."""
    used = {line.look for line in lines}
    return next(look for look in range(wanted, wanted + len(lines) + 1) if look not in used)


def _speed_line(name: str, look: int, runs: Sequence[dict[str, Any]]) -> _Line:
    ordered = sorted(runs, key=lambda run: float(run["realised_sparsity"]))
    spreads = [run["tokens_per_second"] for run in ordered]
    return _Line(
        name,
        look,
        [run["realised_sparsity"] for run in ordered],
        [spread["median"] for spread in spreads],
        [spread["median"] - spread["min"] for spread in spreads],
        [spread["max"] - spread["median"] for spread in spreads],
    )


def _unused(label: str, lines: Sequence[_Line]) -> str:
    """The label, with a number where another result has the same."""
    same = sum(line.label.partition(" (")[0] == label for line in lines)
    return f"{label} ({same + 1})" if same else label


def _alt(what: str, lines: Sequence[_Line], form: str) -> str:
    parts = []
    for line in lines:
        points = zip(line.sparsity, line.values, strict=True)
        parts.append(f"{line.label}: " + ", ".join(f"{form.format(y)} at {x:.0%}" for x, y in points))
    return f"{what} {'; '.join(parts)}."


def _drawer(
    lines: Sequence[_Line], what: str, *, digits: int, from_zero: bool, limits: dict[float, float] | None = None
) -> Callable[[Any], None]:
    """Lines with bars, each named at its right end; the values stand at the points where there is one line only."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        ends = []
        if limits:
            xs, ys = [100 * x for x in sorted(limits)], [limits[x] for x in sorted(limits)]
            axes.plot(xs, ys, color=MUTED, linestyle=(0, (1, 1.5)), linewidth=1.4)
            ends.append((ys[-1], "memory limit", MUTED))
        for line in lines:
            look = series(line.look)
            xs = [100 * x for x in line.sparsity]
            axes.errorbar(xs, line.values, yerr=[line.below, line.above], capsize=3, **look)
            ends.append((line.values[-1], label(line.label), look["color"]))
            if len(lines) == 1:
                for x, y in zip(xs, line.values, strict=True):
                    at = {"textcoords": "offset points", "xytext": (4, -13), "fontsize": 9}
                    axes.annotate(f"{y:.{digits}f}", (x, y), color=look["color"], **at)
        axes.set_xlabel("realised sparsity, %")
        axes.set_ylabel(what)
        axes.grid(color=GRID, linewidth=0.6)
        axes.margins(x=0.03, y=0.12)
        if from_zero:
            axes.set_ylim(bottom=0)
        elif max(max(line.values) for line in lines) > _LOGARITHMIC_ABOVE:
            axes.set_yscale("log")
        _name_ends(axes, ends)

    return draw


def _name_ends(axes: Any, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write each line's name beside the axes, as high as its end, pushed up where it would cover another."""
    limits = axes.get_ylim()
    below = -1.0
    for y, name, colour in sorted(ends):
        share = axes.transAxes.inverted().transform(axes.transData.transform((0.0, y)))[1]
        below = max(share, below + _NAME_HEIGHT)
        place = {"xycoords": "axes fraction", "va": "center", "fontsize": 9}
        axes.annotate(name, (1.01, below), color=colour, **place)
    axes.set_ylim(*limits)
