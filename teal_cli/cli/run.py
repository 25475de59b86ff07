"""`teal run`."""

from pathlib import Path
from typing import Any

from teal_cli.cli.completion import among
from teal_cli.cli.options import Flags, path_argument, with_options
from teal_cli.cli.output import next_command, quieten_libraries
from teal_cli.config import SharedConfig
from teal_cli.config_files import load_recipe, recipe_names
from teal_cli.console import Reporter
from teal_cli.errors import UsageError

_RECIPE = path_argument("recipe", f"YAML recipe, or a packaged one: {', '.join(recipe_names())}", among(recipe_names))


def _run(flags: Flags, config_file: Path | None, recipe: Path) -> None:
    if config_file is not None:
        raise UsageError("teal run takes its configuration from RECIPE: leave out --config")
    loaded = load_recipe(recipe, flags)
    reporter = Reporter(loaded.quiet)
    quieten_libraries()
    from teal_cli.atomic import write_json
    from teal_cli.steps.run import run_recipe

    results = run_recipe(loaded, reporter)
    try:
        _show(results, reporter)
    finally:
        if loaded.json_file is not None:
            write_json(loaded.json_file, results)


def _show(results: dict[str, dict[str, Any]], reporter: Reporter) -> None:
    from teal_cli.report.adapt_tables import adapt_table
    from teal_cli.report.tables import bench_tables, eval_tables, run_table

    if "adapt" in results:
        reporter.show(adapt_table(results["adapt"]))
    if "eval" in results:
        for table in eval_tables(results["eval"]):
            reporter.show(table)
    for table in bench_tables(results["bench"]) if "bench" in results else []:
        reporter.show(table)
    if "eval" in results or "bench" in results:
        reporter.show(run_table(results))
    if "generate" in results:
        sample = results["generate"]
        reporter.show_text(f"\n> {sample['prompt']}\n{sample['text']}")
    if "export" in results:
        onward = next_command("generate", SharedConfig(model=results["export"]["folder"]))
        reporter.say(f"next: {onward}")


command = with_options(SharedConfig, _run, arguments=(_RECIPE,))
