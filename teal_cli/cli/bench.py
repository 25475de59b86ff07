"""`teal bench`."""

from pathlib import Path

from teal_cli.cli.options import Flags, with_options
from teal_cli.cli.output import finish, next_command, prepare
from teal_cli.cli.ranks import run_by_ranks
from teal_cli.config import BenchConfig


def _run(flags: Flags, config_file: Path | None) -> None:
    config, reporter = prepare(BenchConfig, "bench", flags, config_file)
    if run_by_ranks(config, reporter):
        return
    from teal_cli.report.tables import bench_tables
    from teal_cli.steps.bench import bench

    result = bench(config, reporter).to_json()
    finish(config, reporter, result, bench_tables)
    if not config.random_weights:
        own = [run for run in result["runs"] if run["quantization"] == result["quantization"]]
        fastest = max(own[1:] or own, key=lambda run: float(run["speedup"]))
        # That of a TEAL checkpoint was not asked for: it is the folder's own.
        asked = config.mode != "intrinsic" and fastest["sparsity"] in config.sparsity
        sparsity = fastest["sparsity"] if asked else None
        onward = next_command("generate", config, sparsity=sparsity, prompt="Why is the sky blue?")
        reporter.say(f"next: {onward}")


command = with_options(BenchConfig, _run)
