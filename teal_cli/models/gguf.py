"""GGUF files: dequantised once into an ordinary transformers folder under TEAL_HOME."""

import hashlib
import io
from collections.abc import Callable
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from teal_cli.checkpoint.files import update_with_samples
from teal_cli.errors import ArtefactError, MachineError, artefact_error
from teal_cli.models.conversion import ELSEWHERE, converted_once

_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16


def _cache_name(file: Path) -> str:
    """Stem and a digest of size and 64 samples spread over the file: by any path it is converted once."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        magic = stream.read(4)
        if magic != b"GGUF":
            raise ArtefactError(f"{file} is not a GGUF file")
        update_with_samples(digest, stream, 0, size, count=_SAMPLES, size=_SAMPLE_BYTES)
    return f"{file.stem}-{digest.hexdigest()[:16]}"


def converted(file: Path, say: Callable[[str], None] = lambda message: None) -> Path:
    """The transformers folder of a GGUF file, converted on first use.

    Raises:
        ArtefactError: not a GGUF file, or one that transformers cannot read.
        MachineError: the packages that read GGUF are not installed.
    """
    return converted_once(
        _cache_name(file),
        lambda temporary: _convert(file, temporary),
        lambda folder: say(f"converting {file.name} to safetensors, once, into {folder}"),
    )


def _convert(file: Path, folder: Path) -> None:
    for package in ("gguf", "accelerate"):
        if find_spec(package) is None:
            raise MachineError(f"reading {file.name} needs the package {package}: pip install 'teal-cli[gguf]'")
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from teal_cli.models.loading import check_memory

    options: dict[str, object] = {}
    try:
        from transformers import GgufConfig

        # Without it newer transformers keep the quantised tensors, which cannot be saved again.
        options["quantization_config"] = GgufConfig(dequantize=True)
    except ImportError:  # older transformers always dequantise
        pass
    try:
        elements = sum(int(tensor.n_elements) for tensor in GGUFReader(file).tensors)
        check_memory(elements * torch.float32.itemsize, torch.device("cpu"), f"converting {file.name}", ELSEWHERE)
        with redirect_stderr(io.StringIO()):  # a progress bar that transformers cannot be told to hide
            # float32 holds every dequantised value exactly.
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
                trust_remote_code=False,
                **options,
            )
            model, report = loaded
            tokenizer = AutoTokenizer.from_pretrained(
                file.parent, gguf_file=file.name, local_files_only=True, trust_remote_code=False
            )
    except (ValueError, KeyError, RuntimeError, NotImplementedError, IndexError) as error:
        raise artefact_error(error, f"{file} cannot be converted") from error
    if report["missing_keys"]:
        raise ArtefactError(f"{file} lacks {len(report['missing_keys'])} tensors of its model")
    # The quantisation is undone: the folder must not claim it.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
