"""Verbs that several processes run together, each with a shard of the model."""

import sys

from teal_cli.config import DecodingConfig
from teal_cli.console import Reporter
from teal_cli.ranks.environment import is_rank


def run_by_ranks(config: DecodingConfig, reporter: Reporter) -> bool:
    """Run this command line on as many ranks as it asks for; False in one of these, or where one process is enough.

    Calibration and checkpoint are made before, by this process, as one that is alone would make them.

    Raises:
        TealError: what a rank failed with.
    """
    if config.tensor_parallel == 1 or is_rank():
        return False
    from teal_cli.ranks.workers import run_workers
    from teal_cli.steps.artefacts import make_for_ranks

    make_for_ranks(config, reporter)
    if run_workers(config.tensor_parallel, ["-m", "teal_cli", *sys.argv[1:]]) != 0:
        raise KeyboardInterrupt
    return True
