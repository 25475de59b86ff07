"""`teal inspect`."""

from pathlib import Path

from teal_cli.cli.options import Flags, path_argument, with_options
from teal_cli.cli.output import finish, prepare
from teal_cli.config import InspectConfig

_FOLDER = path_argument("folder", "a run folder (runs/<model>) or a TEAL checkpoint")


def _run(flags: Flags, config_file: Path | None, folder: Path) -> None:
    config, reporter = prepare(InspectConfig, "inspect", flags, config_file)
    from teal_cli.report.artefact_tables import inspect_tables
    from teal_cli.steps.inspect import inspect

    result = inspect(folder, verify=config.verify, reporter=reporter)
    finish(config, reporter, result, inspect_tables)


command = with_options(InspectConfig, _run, arguments=(_FOLDER,))
