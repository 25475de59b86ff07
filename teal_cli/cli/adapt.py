"""`teal adapt`."""

from pathlib import Path

from teal_cli.cli.options import Flags, with_options
from teal_cli.cli.output import finish, next_command, prepare
from teal_cli.config import AdaptConfig

_OWN = dict.fromkeys(("architecture", "calibration", "allocation"))
"""What an adapted folder brings with it."""


def _run(flags: Flags, config_file: Path | None) -> None:
    config, reporter = prepare(AdaptConfig, "adapt", flags, config_file)
    from teal_cli.report.adapt_tables import adapt_table
    from teal_cli.steps.adapt import adapt

    summary = adapt(config, reporter)
    if not summary.is_first:  # of several processes, one talks
        return
    finish(config, reporter, summary.to_json(), lambda result: [adapt_table(result)])
    mode = None if (Path(summary.folder) / "teal.json").is_file() else "intrinsic"  # no thresholds: zeros of its own
    onward = next_command("eval", config, **_OWN, model=summary.folder, mode=mode)
    reporter.say(f"written to {summary.folder}; next: {onward}")


command = with_options(AdaptConfig, _run)
