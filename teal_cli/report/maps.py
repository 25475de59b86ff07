"""The heat maps of sparsity: layers down, projections across, the figure in every cell."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from teal_cli.report.drawing import BLACK, INK, WHITE, Plot, label, name_of
from teal_cli.report.inputs import Export, Realised
from teal_cli.report.layers import Grid, grid_of

_Scale = tuple[float, float]
_LEVEL_LETTERS = 6
"""Of a column's name; longer ones are slanted."""
_LEAST_SPAN = 0.2
"""Of a scale, so that rounding does not look like a difference."""


def sparsity_plots(export: Export, realised: Realised | None) -> list[Plot]:
    """What was asked of every projection of one export, and what was counted, on one scale."""
    grid = grid_of(export.plan.projections)
    if not grid.labels:
        return []
    rules = export.plan.projections.items()
    values = {"target": {name: known for name, rule in rules if (known := rule.expected_sparsity) is not None}}
    if realised is not None and realised.by_projection:
        values["realised"] = realised.by_projection
    inside = [value for each in values.values() for row in grid.rows(each) for value in row if value is not None]
    middle, span = (min(inside) + max(inside)) / 2, max(max(inside) - min(inside), _LEAST_SPAN)
    scale = (middle - span / 2, middle + span / 2)
    return [_map(which, export, grid, each, scale) for which, each in values.items()]


def _map(which: str, export: Export, grid: Grid, values: Mapping[str, float], scale: _Scale) -> Plot:
    rows = grid.rows(values)
    longest = max(len(kind) for kind in grid.kinds)
    columns = [[value for value in column if value is not None] for column in zip(*rows, strict=True)]
    spans = [
        f"{kind} {min(column):.0%} to {max(column):.0%}"
        for kind, column in zip(grid.kinds, columns, strict=True)
        if column
    ]
    return Plot(
        name_of("sparsity", export.name, which),
        f"{which}, {export.label}",
        f"Heat map of the {which} sparsity of {export.label}, {len(grid.labels)} layers: {', '.join(spans)}.",
        0.7 + 0.2 * len(grid.labels) + (0.06 * longest if longest > _LEVEL_LETTERS else 0.0),
        _drawer(grid, rows, scale),
    )


def _drawer(grid: Grid, rows: Sequence[Sequence[float | None]], scale: _Scale) -> Callable[[Any], None]:
    def draw(figure: Any) -> None:
        axes = figure.subplots()
        numbers = [[float("nan") if value is None else value for value in row] for row in rows]
        # Cividis looks alike to those who do not tell red from green, and its lightness rises evenly.
        look = {"cmap": "cividis", "vmin": scale[0], "vmax": scale[1]}
        mesh = axes.pcolormesh(numbers, edgecolors="face", linewidth=0.1, **look)
        for y, row in enumerate(rows):
            for x, value in enumerate(row):
                if value is not None:
                    place = {"ha": "center", "va": "center", "fontsize": 9}
                    ink = _readable_on(mesh.cmap(mesh.norm(value)))
                    axes.text(x + 0.5, y + 0.5, f"{100 * value:.0f}", color=ink, **place)
        slanted = any(len(kind) > _LEVEL_LETTERS for kind in grid.kinds)
        turned = {"rotation": 40, "ha": "left", "rotation_mode": "anchor"} if slanted else {}
        axes.set_xticks([x + 0.5 for x in range(len(grid.kinds))], list(map(label, grid.kinds)), **turned)
        axes.set_yticks([y + 0.5 for y in range(len(grid.labels))], list(map(label, grid.labels)))
        axes.tick_params(length=0, labelcolor=INK)
        axes.xaxis.tick_top()
        axes.invert_yaxis()
        axes.set_ylabel("layer")
        axes.spines[:].set_visible(False)

    return draw


def _readable_on(colour: Sequence[float]) -> str:
    """Black or white, whichever has more contrast to a colour (red, green, blue from 0 to 1)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return BLACK if luminance > 0.179 else WHITE  # where both contrasts are equal
