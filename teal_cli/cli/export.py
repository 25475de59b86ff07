"""`teal export`."""

from dataclasses import asdict
from pathlib import Path

from teal_cli.cli.options import Flags, with_options
from teal_cli.cli.output import next_command, prepare, write_result
from teal_cli.config import ExportConfig

_OWN = dict.fromkeys(("architecture", "quantise", "quantise_output", "calibration", "allocation"))
"""What an exported folder brings with it."""


def _run(flags: Flags, config_file: Path | None) -> None:
    config, reporter = prepare(ExportConfig, "export", flags, config_file)
    from teal_cli.steps.export import export

    summary = export(config, reporter)
    how = "linked to" if summary.weights == "link" else "copied from"
    reporter.say(
        f"{summary.projections} projections at sparsity {summary.target_sparsity:g} ({summary.allocation}), "
        f"weights {how} the dense model"
    )
    onward = next_command("eval", config, **_OWN, model=summary.folder)
    reporter.say(f"written to {summary.folder}; next: {onward}")
    write_result(config, asdict(summary))


command = with_options(ExportConfig, _run)
