"""`teal serve`."""

import os
from importlib.util import find_spec
from pathlib import Path

from teal_cli.cli.options import Flags, with_options
from teal_cli.cli.output import prepare, write_result
from teal_cli.cli.ranks import run_by_ranks
from teal_cli.config import ServeConfig
from teal_cli.errors import MachineError
from teal_cli.ranks.environment import is_first, is_rank

_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")


def _run(flags: Flags, config_file: Path | None) -> None:
    config, reporter = prepare(ServeConfig, "serve", flags, config_file)
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise MachineError(f"teal serve needs {', '.join(missing)}: pip install 'teal-cli[serve]'")
    from teal_cli.steps.serve import check_address, follow, serve

    if config.tensor_parallel > 1 and not is_rank():
        check_address(config)
    if run_by_ranks(config, reporter, drains=True):
        return
    if config.tensor_parallel > 1 and not is_first():
        follow(config, reporter)
        return
    if not serve(config, reporter, lambda result: write_result(config, result)):
        os._exit(0)  # the interpreter cannot end cleanly under a thread that loads weights


command = with_options(ServeConfig, _run)
