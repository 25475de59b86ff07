"""What the verbs share: a checked configuration, a quiet library stack, a JSON result."""

import shlex
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from teal_cli.cli.options import Flags
from teal_cli.config import VERB_CONFIGS, OutputConfig, SharedConfig
from teal_cli.config_files import flag_name, keys_of, load_as
from teal_cli.console import Reporter
from teal_cli.plain_table import PlainTable
from teal_cli.ranks.environment import is_first
from teal_cli.versions import now

C = TypeVar("C", bound=OutputConfig)


_WITHOUT_MODELS = ("inspect", "report")
"""Verbs that read files alone: to import transformers would take longer than all that they do."""


def prepare(model: type[C], verb: str, flags: Flags, config_file: Path | None) -> tuple[C, Reporter]:
    """The verb's configuration and a reporter, with the libraries below told to be quiet.

    Everything that is wrong with flags and YAML is raised here, before torch is imported.
    """
    config = load_as(model, verb, flags, config_file)
    if getattr(config, "tensor_parallel", 1) > 1 and not is_first():  # another rank talks and writes
        config.quiet, config.json_file = True, None
    quieten_libraries(models=verb not in _WITHOUT_MODELS)
    return config, Reporter(config.quiet)


def quieten_libraries(*, models: bool = True) -> None:
    """No progress bars or warnings of the libraries below: the reporter is who talks to the user.

    Args:
        models: whether those that load models are used.
    """
    if models:
        from huggingface_hub.utils import logging as hub_logging
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        hub_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)


_CARRIED = (
    *("runs", "device", "dtype", "threads", "architecture", "quantise", "quantise_output"),
    *("calibration", "allocation", "mode", "tensor_parallel"),
)
"""What the next command must repeat to go on with the same model and artefacts."""


def next_command(verb: str, config: SharedConfig, **flags: object) -> str:
    """The command line that goes on from here: this one's model and settings, as far as `verb` has them.

    Args:
        verb: comes next.
        config: of this command.
        flags: further keys; they win, and None leaves one out.
    """
    fields = VERB_CONFIGS[verb].model_fields
    known = keys_of(VERB_CONFIGS[verb])
    values: dict[str, object] = {"model": config.model}
    for key in _CARRIED:
        if key in known and hasattr(config, key):
            value, default = _first(getattr(config, key)), _first(fields[known[key]].default)
            values[key] = None if value == default else value
    values |= flags
    if values.get("quantise") is None:
        values["quantise_output"] = None  # which goes with it
    words = ["teal", verb]
    for key, value in values.items():
        if value is not None:
            words += [flag_name(key)] if value is True else [flag_name(key), str(value)]
    return shlex.join(words)


def _first(value: object) -> object:
    """eval takes a list of what other verbs take one of."""
    return value[0] if isinstance(value, list) else value


def finish(
    config: OutputConfig,
    reporter: Reporter,
    result: dict[str, Any],
    tables: Callable[[dict[str, Any]], Iterable[PlainTable]] = lambda result: (),
) -> None:
    """Show a result and write it where --json says; where one of the two fails, the other is done all the same.

    Args:
        config: of the verb.
        reporter: shows the tables.
        result: as JSON.
        tables: makes them of the result.

    """
    try:
        for table in tables(result):
            reporter.show(table)
    finally:
        write_result(config, result)


def write_result(config: OutputConfig, result: dict[str, Any]) -> None:
    """Write --json, if asked, with the command that made it."""
    if config.json_file is not None:
        from teal_cli.atomic import write_json

        made = {"command": shlex.join(["teal", *sys.argv[1:]]), "config": config.settings(), "finished": now()}
        write_json(config.json_file, {**made, **result})
