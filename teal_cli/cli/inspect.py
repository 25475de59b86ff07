"""`teal inspect`."""

from inspect import Parameter
from pathlib import Path
from typing import Annotated

import typer

from teal_cli.cli.options import Flags, with_options
from teal_cli.cli.output import prepare, write_result
from teal_cli.config import InspectConfig

_FOLDER = Parameter(
    "folder",
    Parameter.POSITIONAL_OR_KEYWORD,
    annotation=Annotated[Path, typer.Argument(help="a run folder (runs/<model>) or a TEAL checkpoint")],
)


def _run(flags: Flags, config_file: Path | None, folder: Path) -> None:
    config, reporter = prepare(InspectConfig, "inspect", flags, config_file)
    from teal_cli.report.artefact_tables import inspect_tables
    from teal_cli.steps.inspect import inspect

    result = inspect(folder, reporter=reporter)
    write_result(config, result)
    for table in inspect_tables(result):
        reporter.show(table)


command = with_options(InspectConfig, _run, arguments=(_FOLDER,))
