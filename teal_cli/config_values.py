"""Types of option values: how a flag's string or a YAML value becomes them, and what is refused."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from teal_cli.errors import nearest
from teal_cli.quantise.scheme import Scheme

Backend = Literal["auto", "reference", "cpu", "triton"]
Mode = Literal["calibrated", "intrinsic"]
ALLOCATION_NAMES = ("uniform", "greedy", "fisher", "fisher-site")


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
    if path.is_dir():
        raise ValueError("this is a folder, give a file")
    return path


def _check_input(path: Path) -> Path:
    if not path.is_file():
        raise ValueError("there is no such file")
    return path


def _check_quantization(text: str) -> str:
    Scheme.parse(text)
    return text


Quantization = Annotated[str, AfterValidator(_check_quantization)]
QuantizationList = Annotated[list[Quantization], BeforeValidator(_split_commas)]
OutputFile = Annotated[Path, AfterValidator(_check_output)]
InputFile = Annotated[Path, AfterValidator(_check_input)]
FileList = Annotated[list[InputFile], BeforeValidator(_split_commas)]


def is_allocation_file(allocation: str) -> bool:
    """Whether an allocation is a file rather than a name."""
    return allocation.endswith((".yaml", ".yml", ".json"))


def _check_allocation(name: str) -> str:
    if is_allocation_file(name):
        if not Path(name).is_file():
            raise ValueError(f"allocation file {name} does not exist")
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
            raise ValueError(f"{pattern}: {least}:{most} is not least:most, both between 0 and {MOST_SPARSITY}")
    return limits


MOST_SPARSITY = 0.99
"""No projection is taken above this by an allocation that weighs costs: beyond, a handful of inputs decide."""
Limits = Annotated[dict[str, tuple[float, float]], BeforeValidator(_split_limits), AfterValidator(_check_limits)]
