"""Verbs that several processes run together, each with a shard of the model."""

import sys

from teal_cli.config import DecodingConfig
from teal_cli.console import Reporter
from teal_cli.ranks.environment import check_launched, is_rank


def run_by_ranks(
    config: DecodingConfig, reporter: Reporter, *, prompt: str | None = None, drains: bool = False
) -> bool:
    """Run this command line on as many ranks as it asks for; False in one of these, or where one process is enough.

    Calibration and checkpoint are made before, by this process, as one that is alone would make them.

    Args:
        config: of the command.
        reporter: told what is made before.
        prompt: of generate, where it is not the configuration's.
        drains: whether the first signal lets the first rank end by itself, and the others with it.

    Raises:
        TealError: what a rank failed with.
    """
    if config.tensor_parallel == 1:
        return False
    check_launched()
    if is_rank():
        return False
    from teal_cli.ranks.group import check_devices
    from teal_cli.ranks.workers import run_workers
    from teal_cli.steps.artefacts import make_for_ranks

    check_devices(config.tensor_parallel, config.device)
    make_for_ranks(config, reporter, None if prompt is None else [{"role": "user", "content": prompt}])
    if run_workers(config.tensor_parallel, ["-P", "-m", "teal_cli", *sys.argv[1:]], drains=drains) != 0:
        raise KeyboardInterrupt
    return True
