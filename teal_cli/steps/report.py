"""Report: the files of a run in, one page and its plots out."""

from dataclasses import dataclass
from pathlib import Path

from teal_cli.atomic import atomic_path
from teal_cli.config import ReportConfig
from teal_cli.console import Reporter
from teal_cli.report.drawing import require_drawing, write_files
from teal_cli.report.inputs import Material, read_material
from teal_cli.report.page import content_of, drawings_of, render
from teal_cli.writing import check_file, check_folder, require


@dataclass(frozen=True)
class ReportResult:
    """What was written, and the three lines that it starts with."""

    page: str
    plots: list[str]
    summary: dict[str, str]


def report(folder: Path, config: ReportConfig, reporter: Reporter) -> ReportResult:
    """Write the report of a run folder, or of one TEAL checkpoint.

    Raises:
        TealError: nothing drawable there, a damaged artefact, or no matplotlib.
    """
    require_drawing()
    material = read_material(folder, config.results, reporter.say)
    page = config.out or _default_page(material)
    plots = config.plots or page.with_name(page.stem if page.suffix else f"{page.name}-plots")
    require(check_file, page)
    require(check_folder, plots)
    drawings = drawings_of(material)
    reporter.say(f"drawing {len(drawings.all())} plots")
    content = content_of(material, drawings)
    with atomic_path(page) as temporary:
        # A file's name may hold bytes that are no text.
        temporary.write_text(render(content), encoding="utf-8", errors="backslashreplace")
    files = [str(file) for plot in drawings.all() for file in write_files(plot, plots)]
    return ReportResult(str(page), files, {line.label.lower(): line.text for line in content.summary})


def _default_page(material: Material) -> Path:
    """RUN/report.html; for one checkpoint RUN/report-NAME.html, since its own folder is a model's."""
    if material.is_checkpoint:
        return material.folder.parent / f"report-{material.name}.html"
    return material.folder / "report.html"
