"""Command-line options, made from the configuration models: each field is a flag."""

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from teal_cli.cli.completion import Completer, completer_for
from teal_cli.config import OTHER_SPELLINGS, OutputConfig, SharedConfig
from teal_cli.config_files import flag_name
from teal_cli.config_values import plain_type
from teal_cli.errors import UsageError

Flags = dict[str, Any]
"""Outside key -> value, of the flags that were given."""

_SHARED_PANEL = "Shared options"


def with_options(
    model: type[OutputConfig],
    body: Callable[..., None],
    *,
    arguments: tuple[inspect.Parameter, ...] = (),
) -> Callable[..., Callable[[], None]]:
    """A function with one typer option for every field of `model`, that returns a call of `body`.

    Options that were not given are not passed on, so that YAML and defaults can speak. Values are
    checked by the model, not by typer: there is one set of rules and one form of message.

    Args:
        model: the verb's configuration.
        body: takes the given flags and the --config file.
        arguments: further typer parameters; their values are passed to body as keyword arguments.
    """

    def command(**values: Any) -> Callable[[], None]:
        config_file = values.pop("config", None)
        extra = {parameter.name: _path(parameter.name, values.pop(parameter.name)) for parameter in arguments}
        given = {keys[name]: value for name, value in values.items() if value is not None}
        return partial(body, given, config_file, **extra)

    keys = {name: field.alias or name for name, field in model.model_fields.items()}
    others = {OTHER_SPELLINGS[name]: field for name, field in model.model_fields.items() if name in OTHER_SPELLINGS}
    keys |= {name: name for name in others}
    config_option = typer.Option("--config", help="YAML file; every flag is a key", rich_help_panel=_SHARED_PANEL)
    parameters = [
        *arguments,
        inspect.Parameter(
            "config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[Path | None, config_option]
        ),
        *(_parameter(name, field, field.alias or name) for name, field in _own_first(model).items()),
        *(_parameter(name, field, name, hidden=True) for name, field in others.items()),
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _own_first(model: type[OutputConfig]) -> dict[str, FieldInfo]:
    """The fields of a verb as its help shows them: its own before those that it shares with others."""
    names = (name for kind in model.__mro__ for name in inspect.get_annotations(kind))
    return {name: model.model_fields[name] for name in dict.fromkeys(names) if name in model.model_fields}


def path_argument(name: str, text: str, completer: Completer | None = None) -> inspect.Parameter:
    """A path that a verb takes without a flag.

    Args:
        name: in errors and in the help.
        text: the help.
        completer: what a shell offers; None for files.
    """
    argument = typer.Argument(help=text, autocompletion=completer)
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=Annotated[str, argument])


def _path(name: str, given: str) -> Path:
    if not given:
        raise UsageError(f"{name.upper()} is empty: give a path")
    return Path(given)


def _parameter(name: str, field: FieldInfo, key: str, *, hidden: bool = False) -> inspect.Parameter:
    flag = flag_name(key)
    is_switch = plain_type(field.annotation) is bool
    option = typer.Option(
        f"{flag}/--no-{flag[2:]}" if is_switch else flag,
        help=_help(field),
        metavar=None if is_switch else _metavar(field),
        rich_help_panel=_SHARED_PANEL if name in SharedConfig.model_fields else None,
        show_default=False,
        hidden=hidden,
        autocompletion=None if is_switch else completer_for(key, plain_type(field.annotation)),
    )
    annotation = Annotated[bool | None, option] if is_switch else Annotated[str | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _help(field: FieldInfo) -> str:
    default = field.default
    text = field.description or ""
    if default is PydanticUndefined or default is None or default is False:
        return text
    shown = ",".join(map(str, default)) if isinstance(default, list | dict) else str(default)
    return f"{text} (default {shown})"


def _metavar(field: FieldInfo) -> str:
    kind = plain_type(field.annotation)
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    if get_origin(kind) is list:
        return "X,Y,.."
    return {int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT")
