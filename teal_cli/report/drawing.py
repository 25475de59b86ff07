"""How plots look, and how a matplotlib figure becomes a file or a part of a page.

A figure is drawn once, in the colours of light pages. For a page its colours become CSS variables, so that one
drawing follows the reader's choice of light or dark; texts stay texts, which can be searched and read aloud.
"""

import io
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from teal_cli.atomic import atomic_path
from teal_cli.errors import MachineError, printable

INK, MUTED, GRID, PAPER = "#1b1f24", "#5c646d", "#d5d9de", "#ffffff"
BLACK, WHITE = "#010101", "#fefefe"
"""On coloured cells, whatever the page; not the ink or the paper, which change with it."""
# Told apart by people who see colours otherwise, and by lightness (after Okabe and Ito, darkened to be read on white).
SERIES = ("#0072b2", "#c44e00", "#00795a", "#a6478f", "#6b5b00")
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    PAPER: "--paper",
    **{colour: f"--series-{index}" for index, colour in enumerate(SERIES, start=1)},
}
_LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
_MARKERS = ("o", "s", "^", "D", "v")
WIDTH = 5.2
"""Inches. At 72 units an inch and 10 units a letter, a figure can be read on a screen 360 pixels wide."""
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "legend.fontsize": 9,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.facecolor": "none",
    "figure.facecolor": PAPER,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
}


@dataclass(frozen=True)
class Plot:
    """A drawing and what to say about it."""

    name: str
    """Of its files and ids (`name_of`); unique in a report."""
    title: str
    alt: str
    """What it shows, in words and figures, for those who do not see it."""
    height: float
    """Inches."""
    draw: Callable[[Any], None]
    """Draws into an empty matplotlib Figure."""

    @cached_property
    def images(self) -> "Images":
        """The drawing, in the colours of light pages."""
        os.environ["MPLBACKEND"] = "agg"  # a notebook's, which this environment may lack, is refused at the import
        import matplotlib
        from matplotlib.figure import Figure

        # The salt makes the ids of a drawing the same every time, and another drawing's different.
        settings: Any = {**_STYLE, "svg.hashsalt": self.name}
        svg, png = io.StringIO(), io.BytesIO()
        with matplotlib.rc_context(settings):
            figure = Figure(figsize=(WIDTH, self.height), layout="constrained")
            self.draw(figure)
            figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
            figure.set_layout_engine("none")  # the places that the first has found: a quarter of the time
            figure.savefig(png, format="png", dpi=200)
        return Images(svg.getvalue(), png.getvalue())


@dataclass(frozen=True)
class Images:
    """One drawing in two formats."""

    svg: str
    png: bytes


def series(index: int) -> dict[str, Any]:
    """Colour, line style and marker of a line: each of the three tells it from its neighbours."""
    return {
        "color": SERIES[index % len(SERIES)],
        "linestyle": _LINES[index % len(_LINES)],
        "marker": _MARKERS[index % len(_MARKERS)],
    }


def name_of(*parts: str) -> str:
    """A plot's name, of parts that may hold anything: it becomes a file's name and a part of ids in the page."""
    return re.sub("[^0-9A-Za-z.-]+", "-", "-".join(parts))


def label(text: str) -> str:
    """A name as a text of a plot; between dollar signs matplotlib would read mathematics."""
    return printable(text).replace("$", r"\$")


def require_drawing() -> None:
    """Fail before the work where no report can be made.

    Raises:
        MachineError: matplotlib or jinja2 is not installed.
    """
    for package in ("matplotlib", "jinja2"):
        if find_spec(package) is None:
            raise MachineError(f"teal report needs {package}, which is not here: pip install 'teal-cli[report]'")


def write_files(plot: Plot, folder: Path) -> list[Path]:
    """FOLDER/<name>.svg and FOLDER/<name>.png."""
    contents = {folder / f"{plot.name}.svg": plot.images.svg.encode(), folder / f"{plot.name}.png": plot.images.png}
    for path, content in contents.items():
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
    return list(contents)


def inline_svg(plot: Plot) -> str:
    """An <svg> element for an HTML page: no ids that clash, no links, colours by CSS variables."""
    text = plot.images.svg
    text = text[text.index("<svg") :]
    # The page has a style of its own; matplotlib's speaks of every element there is.
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = text.replace("xlink:href=", "href=")
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda found: _own_id(plot, found[1]) if found[1] in used else "", text)
    text = re.sub(r'(href="|url\()#', rf"\g<1>#{plot.name}-", text)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", text)
    # A hundredth of a unit is a fortieth of a pixel; with all digits a page is twice as large.
    text = re.sub(r' d="[^"]+"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    box = re.search(r'viewBox="[^"]+"', text)
    head = f'<svg {box[0] if box else ""} role="img" aria-label="{escape(printable(plot.alt))}">'
    return re.sub(r"<svg[^>]*>", lambda _: head, text, count=1).strip()


def _own_id(plot: Plot, name: str) -> str:
    return f' id="{plot.name}-{name}"'
