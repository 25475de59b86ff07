"""`teal calibrate`."""

from pathlib import Path

from teal_cli.cli.options import Flags, with_options
from teal_cli.cli.output import finish, next_command, prepare
from teal_cli.config import CalibrateConfig


def _run(flags: Flags, config_file: Path | None) -> None:
    config, reporter = prepare(CalibrateConfig, "calibrate", flags, config_file)
    from teal_cli.report.tables import calibration_table
    from teal_cli.steps.calibrate import calibrate, run_folder
    from teal_cli.steps.run import calibration_summary
    from teal_cli.workspace import Workspace

    workspace = Workspace.of(config, reporter)
    result = calibration_summary(calibrate(config, reporter, workspace))
    finish(config, reporter, result, lambda result: [calibration_table(result)])
    onward = next_command("export", config, calibration=config.out, sparsity=0.5)
    reporter.say(f"written to {run_folder(config, workspace)}; next: {onward}")


command = with_options(CalibrateConfig, _run)
