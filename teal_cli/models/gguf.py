"""GGUF files: dequantised once into an ordinary transformers folder under TEAL_HOME."""

import hashlib
import io
from collections.abc import Callable
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from teal_cli.atomic import update_with_samples
from teal_cli.errors import ArtefactError, MachineError, blame, shown
from teal_cli.models.config_checks import check_config
from teal_cli.models.conversion import ELSEWHERE, conversion_folder, converted_once
from teal_cli.models.gguf_header import (
    GgufHeader,
    check_data,
    check_magic,
    check_parts,
    merge,
    parts_of,
    read_header,
    stem_of,
)
from teal_cli.models.loading import check_memory, check_size

_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16
_ENDS = ("eos", "eot", "eom")
"""Of a text, of a turn, of a message: each ends a reply, as llama.cpp has it."""


def model_name(file: Path) -> str:
    """What the model of a file is called; all parts of a split file have one name."""
    return stem_of(file)


def _identity(parts: list[Path]) -> str:
    """Sizes, and a digest of 64 samples spread over each file: by any path it is converted once."""
    digest = hashlib.sha256()
    for file in parts:
        check_magic(file)
        size = file.stat().st_size
        digest.update(f"{size} ".encode())
        with file.open("rb") as stream:
            update_with_samples(digest, stream, 0, size, count=_SAMPLES, size=_SAMPLE_BYTES)
    return digest.hexdigest()


def converted(file: Path, say: Callable[[str], None] = lambda message: None) -> Path:
    """The transformers folder of a GGUF file, converted on first use.

    Args:
        file: of a split file any part: all are read.
        say: told what takes a while.

    Raises:
        ArtefactError: not a GGUF file, a part missing, damaged, or one that transformers cannot read.
        MachineError: the packages that read GGUF are not installed, out of memory, or nowhere to write.
    """
    check_magic(file)
    parts = parts_of(file)
    what = file.name if len(parts) == 1 else f"{model_name(file)} ({len(parts)} parts)"
    target = conversion_folder(model_name(file), _identity(parts))
    if not target.is_dir():
        _require_packages(file)
    return converted_once(
        target,
        lambda temporary: _convert(parts, temporary),
        lambda folder: say(f"converting {what} to safetensors, once, into {folder}"),
    )


def _require_packages(file: Path) -> None:
    for package in ("gguf", "accelerate"):
        if find_spec(package) is None:
            raise MachineError(f"reading {file.name} needs the package {package}: pip install 'teal-cli[gguf]'")


def _checked_headers(parts: list[Path]) -> list[GgufHeader]:
    """The headers of all parts, once nothing in them can fill the memory or stand still."""
    from gguf import GGML_QUANT_SIZES

    headers = [read_header(part) for part in parts]
    check_parts(headers)
    for header in headers:
        check_data(header, {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()})
    values, tensors = headers[0].values, sum(len(header.tensors) for header in headers)
    if tensors == 0:
        raise ArtefactError(f"GGUF file {parts[0]} has no tensors: it is a vocabulary alone, or damaged")
    # What a file does not say, transformers takes from its defaults: a model of another size.
    key = f"{values.get('general.architecture')}.block_count"
    blocks = values.get(key)
    if type(blocks) is not int or not 0 < blocks <= tensors:
        raise ArtefactError(
            f"GGUF file {parts[0]} is damaged: {shown(key)} is {shown(blocks)}, and it has {tensors} tensors; "
            "download it again"
        )
    return headers


def _convert(parts: list[Path], folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    file = parts[0]
    headers = _checked_headers(parts)
    elements = sum(header.elements for header in headers)
    check_memory(elements * torch.float32.itemsize, torch.device("cpu"), f"converting {file.name}", ELSEWHERE)
    # Under a name that transformers takes, whatever the case of the suffix.
    source = folder / "source.gguf"
    if len(parts) == 1:
        source.symlink_to(file.resolve())
    else:
        merge(headers, source)
    options: dict[str, Any] = {"gguf_file": source.name, "local_files_only": True, "trust_remote_code": False}
    with blame(f"{file} cannot be converted"), redirect_stderr(io.StringIO()):  # a progress bar that stays otherwise
        config = AutoConfig.from_pretrained(folder, **options)
        check_config(config.to_dict(), f"the configuration in {file}")
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        check_size(empty, elements, f"the configuration in {file}")
        # float32 holds every dequantised value exactly. Without GgufConfig newer transformers keep the quantised
        # tensors, which cannot be saved again.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            output_loading_info=True,
            quantization_config=GgufConfig(dequantize=True),
            **options,
        )
        model, report = loaded
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    source.unlink()
    if report["missing_keys"]:
        raise ArtefactError(f"{file} lacks {len(report['missing_keys'])} tensors of its model")
    # The quantisation is undone: the folder must not claim it.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.generation_config.eos_token_id = _ends(headers[0], model.generation_config.eos_token_id)
    with redirect_stderr(io.StringIO()):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _ends(header: GgufHeader, known: int | list[int] | None) -> int | list[int] | None:
    """Every token that ends a reply: those that transformers found, and those of the file's that it leaves out."""
    found = [] if known is None else [known] if isinstance(known, int) else list(known)
    for name in _ENDS:
        value = header.values.get(f"tokenizer.ggml.{name}_token_id")
        if type(value) is int and value not in found:
            found.append(value)
    return found[0] if len(found) == 1 else found or None
