"""`teal report`."""

from dataclasses import asdict
from pathlib import Path

from teal_cli.cli.options import Flags, path_argument, with_options
from teal_cli.cli.output import prepare, write_result
from teal_cli.config import ReportConfig

_RUN = path_argument("run", "a run folder (runs/<model>), or a TEAL checkpoint in one")


def _run(flags: Flags, config_file: Path | None, run: Path) -> None:
    config, reporter = prepare(ReportConfig, "report", flags, config_file)
    from teal_cli.steps.report import report

    result = report(run, config, reporter)
    try:
        reporter.show_text(result.page)
    finally:
        write_result(config, asdict(result))


command = with_options(ReportConfig, _run, arguments=(_RUN,))
