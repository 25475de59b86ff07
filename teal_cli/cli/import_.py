"""`teal import`."""

from pathlib import Path

from teal_cli.cli.options import Flags, path_argument, with_options
from teal_cli.cli.output import finish, next_command, prepare
from teal_cli.config import ImportConfig

_FOLDER = path_argument("folder", "models/NAME of FasterDecoding/TEAL: histograms/, lookup/")


def _run(flags: Flags, config_file: Path | None, folder: Path) -> None:
    config, reporter = prepare(ImportConfig, "import", flags, config_file)
    from teal_cli.report.tables import calibration_table
    from teal_cli.steps.calibrate import run_folder
    from teal_cli.steps.import_reference import import_reference
    from teal_cli.steps.run import calibration_summary
    from teal_cli.workspace import Workspace

    workspace = Workspace.of(config, reporter)
    calibration, files = import_reference(folder, config, reporter, workspace)
    result = {**calibration_summary(calibration), "allocations": [str(file) for file in files]}
    finish(config, reporter, result, lambda result: [calibration_table(result)])
    for file in files:
        reporter.say(f"the lookup's allocation: --allocation {file}")
    onward = next_command("export", config, calibration=config.out, sparsity=config.sparsity[0])
    reporter.say(f"written to {run_folder(config, workspace)}; next: {onward}")


command = with_options(ImportConfig, _run, arguments=(_FOLDER,))
