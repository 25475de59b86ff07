"""`teal eval`."""

from pathlib import Path
from typing import Any

from teal_cli.cli.options import Flags, with_options
from teal_cli.cli.output import finish, next_command, prepare
from teal_cli.cli.ranks import run_by_ranks
from teal_cli.config import EvalConfig


def _run(flags: Flags, config_file: Path | None) -> None:
    config, reporter = prepare(EvalConfig, "eval", flags, config_file)
    if run_by_ranks(config, reporter):
        return
    from teal_cli.evaluation.results import EncoderResult, EvalResult
    from teal_cli.report.tables import eval_tables
    from teal_cli.steps.evaluate import evaluate

    def show(found: EvalResult | EncoderResult) -> dict[str, Any]:
        result = found.to_json()
        finish(config, reporter, result, eval_tables)
        return result

    def keep(found: EvalResult) -> None:
        reporter.say("what follows was finished before the error")
        show(found)

    result = show(evaluate(config, reporter, keep=keep))
    if result.get("kind") != "encoder":  # which decodes nothing
        reporter.say(f"next: {next_command('bench', config, sparsity=_joined(config.sparsity))}")


def _joined(values: list[float] | None) -> str | None:
    return None if values is None else ",".join(f"{value:g}" for value in values)


command = with_options(EvalConfig, _run)
