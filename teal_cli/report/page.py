"""The report as one HTML page that needs nothing else: no network, no script, no other file."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from teal_cli.errors import printable
from teal_cli.plain_table import PlainTable
from teal_cli.report.adapt_tables import adapt_table
from teal_cli.report.artefact_tables import calibration_facts, exports_table, projection_tables, versions_text
from teal_cli.report.contents import describe_calibration, describe_export, describe_projections, describe_results
from teal_cli.report.distributions import SHOWN_EXPORTS, distribution_plots
from teal_cli.report.drawing import Plot, inline_svg
from teal_cli.report.inputs import Export, Material, Result
from teal_cli.report.maps import sparsity_plots
from teal_cli.report.plots import quality_plots, speed_plots
from teal_cli.report.samples import Passages, passages
from teal_cli.report.summary import Line, how_to_measure, summary
from teal_cli.report.tables import bench_tables, eval_tables
from teal_cli.report.training import training_plots
from teal_cli.version import __version__
from teal_cli.versions import now


@dataclass(frozen=True)
class Drawn:
    """A plot on the page."""

    title: str
    svg: str


@dataclass(frozen=True)
class Listed:
    """A table on the page."""

    title: str
    header: list[str]
    """Empty where the first column says what each row is."""
    rows: list[list[str]]


@dataclass(frozen=True)
class Part:
    """Plots side by side, and the tables that say the same in figures."""

    title: str = ""
    plots: list[Drawn] = field(default_factory=list)
    tables: list[Listed] = field(default_factory=list)


@dataclass(frozen=True)
class Made:
    """A result and how it was made."""

    file: str
    verb: str
    finished: str
    where: str
    how: str
    """The command, or the settings as YAML."""


@dataclass(frozen=True)
class Content:
    """Everything that the template writes. An empty part is replaced by the command that makes it."""

    title: str
    summary: list[Line]
    facts: list[Listed]
    made: list[Made]
    quality: list[Part]
    speed: list[Part]
    training: list[Part]
    sparsity: list[Part]
    further_sparsity: list[Part]
    distributions: list[Part]
    passages: list[Passages]
    replies: list[dict[str, Any]]
    commands: dict[str, str]
    """By verb: how to make what is absent."""
    is_encoder: bool
    written: str
    version: str


@dataclass(frozen=True)
class Drawings:
    """The plots of a report, by section."""

    quality: list[Plot]
    speed: list[Plot]
    training: list[Plot]
    sparsity: dict[str, list[Plot]]
    """By export."""
    distributions: list[Plot]

    def all(self) -> list[Plot]:
        """In the order of the page."""
        maps = [plot for plots in self.sparsity.values() for plot in plots]
        return [*self.quality, *self.speed, *self.training, *maps, *self.distributions]


def drawings_of(material: Material) -> Drawings:
    """What there is to draw. Of each allocation, the export nearest to the one in focus has heat maps."""
    nearest: dict[str, Export] = {}
    for export in _by_relevance(material):
        nearest.setdefault(export.plan.allocation, export)
    mapped = list(nearest.values())[:SHOWN_EXPORTS]
    return Drawings(
        quality_plots(material),
        speed_plots(material),
        training_plots(material),
        {export.name: sparsity_plots(export, material.realised(export)) for export in mapped},
        distribution_plots(material.calibration, _by_relevance(material)) if material.calibration is not None else [],
    )


def content_of(material: Material, drawings: Drawings) -> Content:
    """What the page says."""
    parts = [(export, _sparsity(export, material, drawings)) for export in _by_relevance(material)]
    described = [describe_export(export, material) for export in material.exports]
    overview = [Part(tables=[listed(exports_table(described))])] if described else []
    calibration = describe_calibration(material)
    return Content(
        title=material.name,
        summary=summary(material),
        facts=[listed(calibration_facts(calibration))] if calibration is not None else [],
        made=[_made(result) for result in describe_results(material)],
        quality=_measured(drawings.quality, material.of_kind("eval", "encoder"), eval_tables),
        speed=_measured(drawings.speed, material.of_kind("bench"), bench_tables),
        training=_training(drawings.training, material),
        sparsity=[*overview, *(part for export, part in parts if export.name in drawings.sparsity)],
        further_sparsity=[part for export, part in parts if export.name not in drawings.sparsity],
        distributions=[Part(plots=_drawn(drawings.distributions))] if drawings.distributions else [],
        passages=passages(material),
        replies=[result.content for result in material.of_kind("generate")],
        commands={verb: how_to_measure(verb, material) for verb in ("calibrate", "export", "eval", "bench")},
        is_encoder=material.is_encoder,
        written=now().replace("T", " ").replace("+00:00", " UTC"),
        version=__version__,
    )


def render(content: Content) -> str:
    """The page. Every text is escaped, control characters too: models write whatever they like."""
    import jinja2
    from markupsafe import Markup

    def shown(value: object) -> object:
        return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    folder = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=folder,
        autoescape=True,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("page.html").render(vars(content))


def listed(table: PlainTable) -> Listed:
    """A table as data, so that page and terminal show the same."""
    rows = [[str(cell) for cell in row] for row in zip(*(column.cells for column in table.columns), strict=True)]
    header = [str(column.header) for column in table.columns] if table.show_header else []
    return Listed(table.heading, header, rows)


def _drawn(plots: Sequence[Plot]) -> list[Drawn]:
    return [Drawn(plot.title, inline_svg(plot)) for plot in plots]


def _measured(
    plots: Sequence[Plot], results: Sequence[Result], tables: Callable[[dict[str, Any]], list[PlainTable]]
) -> list[Part]:
    if not results:
        return []
    found = [listed(table) for result in results for table in tables(result.content)]
    return [Part(plots=_drawn(plots), tables=found)]


def _training(plots: Sequence[Plot], material: Material) -> list[Part]:
    if not material.adapted:
        return []
    found = [listed(adapt_table(adapted.record.model_dump(mode="json"))) for adapted in material.adapted]
    return [Part(plots=_drawn(plots), tables=found)]


def _by_relevance(material: Material) -> list[Export]:
    """The export in focus, then those of its target, then the others."""
    focus = material.focus
    if focus is None:
        return []

    def rank(export: Export) -> tuple[bool, float, str]:
        distance = abs(export.plan.target_sparsity - focus.plan.target_sparsity)
        return export is not focus, round(distance, 6), export.name

    return sorted(material.exports, key=rank)


def _sparsity(export: Export, material: Material, drawings: Drawings) -> Part:
    realised = material.realised(export)
    title = export.label + ("" if realised is None else f", realised {realised.model_wide:.3f}")
    tables = projection_tables(describe_projections(export, material))
    return Part(title, _drawn(drawings.sparsity.get(export.name, [])), [listed(table) for table in tables])


def _made(result: dict[str, Any]) -> Made:
    how = result["command"] or ""
    if not how and result["config"]:
        how = yaml.safe_dump(result["config"], sort_keys=False, allow_unicode=True)
    parts = [result["device"], result["dtype"], versions_text(result["versions"]) if result["versions"] else None]
    return Made(result["file"], result["verb"], result["finished"], "; ".join(filter(None, parts)), how)
