"""What a shell offers after a flag. Nothing heavy is imported: a person waits for it at every tab.

`teal --help` imports this too, so even pydantic waits until it is needed.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

Completer = Callable[[str], list[str]]
"""What has been typed of a value -> values that it may become."""


def _models() -> list[str]:
    """Aliases, and the exports that lie under the default folder of results."""
    from teal_cli.models.aliases import alias_names

    return [*alias_names(), *sorted(str(file.parent) for file in Path("runs").glob("*/*/teal.json"))]


def _allocations() -> list[str]:
    from teal_cli.config_values import ALLOCATION_NAMES

    files = [*Path().glob("*.yaml"), *Path("runs").glob("*/lookup-*.yaml"), *Path("runs").glob("*/*/allocation.yaml")]
    return [*ALLOCATION_NAMES, *sorted(map(str, files))]


def _recipes() -> list[str]:
    from teal_cli.config.recipes import recipe_names

    return recipe_names()


_OFFERED: dict[str, Callable[[], Iterable[str]]] = {
    "model": _models,
    "allocation": _allocations,
    "recipe": _recipes,
    "dataset": lambda: ("sotu", "self"),
    "quantise": lambda: ("int8", "int4", "int4:32", "int4:64"),
}
"""Key of a configuration -> what it may be; keys of a few fixed values offer those."""


def completer_for(key: str, kind: Any) -> Completer | None:
    """What to offer for an option; None leaves it to the shell, which offers files.

    Args:
        key: of the configuration.
        kind: plain type of its field.
    """
    if get_origin(kind) is Literal:
        return among(lambda: get_args(kind))
    offered = _OFFERED.get(key)
    return None if offered is None else among(offered, is_list=get_origin(kind) is list)


def among(offered: Callable[[], Iterable[str]], *, is_list: bool = False) -> Completer:
    """Of what is offered, what begins as typed; of a list with commas, its last part."""

    def complete(incomplete: str) -> list[str]:
        head, comma, open_part = incomplete.rpartition(",") if is_list else ("", "", incomplete)
        return [f"{head}{comma}{value}" for value in offered() if value.startswith(open_part)]

    return complete


def words_typed(environment: Mapping[str, str]) -> Sequence[str]:
    """The command line that a shell asks completions for; empty where none does."""
    if "_TEAL_COMPLETE" not in environment:
        return []
    return (environment.get("COMP_WORDS") or environment.get("_TYPER_COMPLETE_ARGS", "")).split()
