"""Types of the values in JSON artefacts: strict, since 1 is not true and "64" is no number."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from teal_cli.errors import ArtefactError

_T = TypeVar("_T")
_MOST = 2**62
"""Of a count: sums of a few fit into an int64."""


_GREATEST = 1e100
"""Of a measure: no axis has room for more."""


def _measured(value: float) -> float:
    if abs(value) > _GREATEST:
        raise ValueError("it is absurdly large")
    return value


def _above_zero(value: float) -> float:
    if value <= 0.0:
        raise ValueError("it is not above zero")
    return value


def moment(text: str) -> datetime:
    """The time that `versions.now` wrote, in UTC.

    Raises:
        ValueError: it is no time.
    """
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except OverflowError as error:  # at the ends of the calendar
        raise ValueError("it is no time of this era") from error


def _is_moment(text: str) -> str:
    moment(text)
    return text


Text = Annotated[str, Field(strict=True)]
Name = Annotated[str, Field(strict=True, max_length=4096)]
"""What is shown in tables, or is a path."""
Flag = Annotated[bool, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=0, le=_MOST)]
Size = Annotated[int, Field(strict=True, ge=1, le=2**40)]
"""Of a side of a matrix."""
Whole = Annotated[int, Field(strict=True, ge=-_MOST, le=_MOST)]
Amount = Annotated[float, Field(strict=True, ge=0.0, le=1e18, allow_inf_nan=False)]
"""Seconds, speeds, thresholds, bytes."""
Share = Annotated[float, Field(strict=True, ge=0.0, le=1.0)]
Sparsity = Annotated[float, Field(strict=True, ge=0.0, lt=1.0)]
Measure = Annotated[float, Field(strict=True), AfterValidator(_measured)]
"""A result, which may be NaN: null in JSON (`checkpoint.results.read_result`)."""
AboveZero = Annotated[float, Field(strict=True), AfterValidator(_measured), AfterValidator(_above_zero)]
"""A result, a perplexity for one, which may be NaN too."""
Positive = Annotated[float, Field(strict=True, gt=0.0, le=1e18, allow_inf_nan=False)]
Moment = Annotated[str, Field(strict=True, max_length=64), AfterValidator(_is_moment)]
Digest = Annotated[str, Field(strict=True, pattern=r"^[0-9a-f]{64}$")]
Versions = dict[Name, Name]


class Content(BaseModel):
    """A mapping of known keys; further ones are left alone."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())


def checked(kind: type[_T], content: Mapping[str, Any], what: str, path: Path, advice: str) -> _T:
    """A mapping as the type that its keys and values must have.

    Args:
        kind: a `Content`, or a dataclass of the types above.
        content: from a file.
        what: names the file in errors.
        path: of the file.
        advice: what the user can do.

    Raises:
        ArtefactError: a missing key, or a value of another type or out of range.
    """
    try:
        return _adapter(kind).validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part)[:100] for part in first["loc"][:8])
        raise ArtefactError(f"{what} {path} is damaged ({where}: {first['msg'][:200]}): {advice}") from error


_ADAPTERS: dict[type, TypeAdapter[Any]] = {}


def _adapter(kind: type[_T]) -> TypeAdapter[_T]:
    return _ADAPTERS.setdefault(kind, TypeAdapter(kind))
