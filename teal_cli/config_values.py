"""Types of option values: how a flag's string or a YAML value becomes them, and what is refused."""

import types
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BeforeValidator, Field, InstanceOf, PlainSerializer

from teal_cli.errors import nearest, shown
from teal_cli.schemes import Scheme
from teal_cli.speculation import Speculation
from teal_cli.writing import check_file, check_folder

Backend = Literal["auto", "reference", "cpu", "triton"]
Mode = Literal["calibrated", "intrinsic"]
# Not on and off, which YAML reads as true and false.
Compile = Literal["auto", "always", "never"]
ALLOCATION_NAMES = ("uniform", "greedy", "fisher", "fisher-site")


def plain_type(annotation: Any) -> Any:
    """The type inside Optional and Annotated."""
    if get_origin(annotation) is Annotated:
        return plain_type(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        inner = [part for part in get_args(annotation) if part is not type(None)]
        return plain_type(inner[0])
    return annotation


def check_plainly(value: object, annotation: Any) -> None:
    """Refuse what pydantic would take for something else: true for 1, an empty path for the working directory.

    Args:
        value: of a flag or a YAML file.
        annotation: of its field.

    Raises:
        ValueError: what is wrong with it.
    """
    kind = plain_type(annotation)
    for part in value if isinstance(value, list | tuple) else [value]:
        if isinstance(part, bool) and kind is not bool:
            raise ValueError("this is true or false, and another value is needed (in YAML, no and off are false)")
        if isinstance(part, str) and "\0" in part:
            raise ValueError("there is a NUL in it")
        if part == "" and kind in (str, Path):
            raise ValueError("this is empty")
        if isinstance(part, str) and kind is not Path and any("\ud800" <= char <= "\udfff" for char in part):
            raise ValueError("this is not UTF-8")


def _split_commas(value: object) -> object:
    """A flag gives one string for a list: "0.4,0.5"; YAML gives a list, or one bare value."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return [value] if isinstance(value, int | float) else value


def _check_sparsity(value: float) -> float:
    # Written so that NaN fails too.
    if not 0.0 <= value < 1.0:
        raise ValueError("sparsity is a share, at least 0 and below 1")
    return value


Sparsity = Annotated[float, AfterValidator(_check_sparsity)]
SparsityList = Annotated[list[Sparsity], BeforeValidator(_split_commas), Field(min_length=1)]
NameList = Annotated[list[str], BeforeValidator(_split_commas)]


def _split_tokens(value: object) -> object:
    """As `_split_commas`, but blanks are kept: a stop token may be one. A comma must come from a YAML list."""
    return value.split(",") if isinstance(value, str) else value


TokenList = Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_split_tokens)]


def _check_output(path: Path) -> Path:
    if str(path) == "-":
        raise ValueError("it is written to a file, not to stdout: give a path")
    check_file(path)
    return path


def _check_output_folder(path: Path) -> Path:
    check_folder(path)
    return path


def _check_input(path: Path) -> Path:
    try:
        if not path.is_file():
            raise ValueError("this is no ordinary file" if path.exists() else "there is no such file")
    except OSError as error:
        raise ValueError(f"it cannot be read ({error.strerror})") from error
    return path


def _parse_scheme(value: object) -> object:
    return value if isinstance(value, Scheme) else Scheme.parse(str(value))


# Parsed here and nowhere else; a result says it as text.
Quantisation = Annotated[
    InstanceOf[Scheme], BeforeValidator(_parse_scheme), PlainSerializer(lambda scheme: scheme.text, return_type=str)
]


def _parse_speculation(value: object) -> object:
    return value if isinstance(value, Speculation) else Speculation.parse(str(value))


Drafts = Annotated[
    InstanceOf[Speculation],
    BeforeValidator(_parse_speculation),
    PlainSerializer(lambda drafts: drafts.text, return_type=str),
]
DraftsList = Annotated[list[Drafts], BeforeValidator(_split_commas)]
QuantisationList = Annotated[list[Quantisation], BeforeValidator(_split_commas)]
OutputFolder = Annotated[Path, AfterValidator(_check_output_folder)]
OutputFile = Annotated[Path, AfterValidator(_check_output)]
InputFile = Annotated[Path, AfterValidator(_check_input)]
FileList = Annotated[list[InputFile], BeforeValidator(_split_commas)]


def is_allocation_file(allocation: str) -> bool:
    """Whether an allocation is a file rather than a name."""
    return allocation.endswith((".yaml", ".yml", ".json"))


def _check_allocation(name: str) -> str:
    if is_allocation_file(name):
        try:
            _check_input(Path(name))
        except ValueError as error:
            raise ValueError(f"allocation file {shown(name)}: {error}") from error
    elif name not in ALLOCATION_NAMES:
        raise ValueError(f"neither an allocation nor a .yaml or .json file{nearest(name, ALLOCATION_NAMES)}")
    return name


AllocationName = Annotated[str, AfterValidator(_check_allocation)]
AllocationList = Annotated[list[AllocationName], BeforeValidator(_split_commas), Field(min_length=1)]
PositionList = Annotated[list[Annotated[int, Field(ge=1)]], BeforeValidator(_split_commas), Field(min_length=1)]


def _split_limits(value: object) -> object:
    """A flag gives "*.down_proj=0:0.8,*.0.*=0:0.3"; YAML gives a mapping of patterns to pairs."""
    if not isinstance(value, str):
        return value
    pairs = [part.rpartition("=") for part in value.split(",") if part.strip()]
    return {pattern.strip(): tuple(bounds.split(":")) for pattern, _, bounds in pairs}


def _check_limits(limits: Mapping[str, tuple[float, float]]) -> Mapping[str, tuple[float, float]]:
    for pattern, (least, most) in limits.items():
        if not 0.0 <= least <= most <= MOST_SPARSITY:
            raise ValueError(f"{shown(pattern)}: {least}:{most} is not least:most, both between 0 and {MOST_SPARSITY}")
    return limits


MOST_SPARSITY = 0.99
"""No projection is taken above this by an allocation that weighs costs: beyond, a handful of inputs decide."""
Limits = Annotated[dict[str, tuple[float, float]], BeforeValidator(_split_limits), AfterValidator(_check_limits)]
