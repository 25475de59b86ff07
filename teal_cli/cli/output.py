"""What the verbs share: a checked configuration, a quiet library stack, a JSON result."""

import shlex
import sys
import warnings
from pathlib import Path
from typing import Any, TypeVar

from teal_cli.cli.options import Flags
from teal_cli.config import OutputConfig
from teal_cli.config_files import load_verb
from teal_cli.report.console import Reporter
from teal_cli.versions import now

C = TypeVar("C", bound=OutputConfig)


def prepare(model: type[C], verb: str, flags: Flags, config_file: Path | None) -> tuple[C, Reporter]:
    """The verb's configuration and a reporter, with the libraries below told to be quiet.

    Everything that is wrong with flags and YAML is raised here, before torch is imported.
    """
    config = load_verb(verb, flags, config_file)
    if not isinstance(config, model):
        raise TypeError(f"{verb} is configured by {type(config).__name__}, not {model.__name__}")
    quieten_libraries()
    return config, Reporter(config.quiet)


def quieten_libraries() -> None:
    """No progress bars or warnings of the libraries below: the reporter is who talks to the user."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)


def write_result(config: OutputConfig, result: dict[str, Any]) -> None:
    """Write --json, if asked, with the command that made it."""
    if config.json_file is not None:
        from teal_cli.checkpoint.files import write_json

        made = {"command": shlex.join(["teal", *sys.argv[1:]]), "config": config.settings(), "finished": now()}
        write_json(config.json_file, {**made, **result})
