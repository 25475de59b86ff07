"""Checkpoints that GPTQ or AWQ quantised to 4 bits: laid out anew, every code, scale and zero point as it was.

Such a folder becomes a dense one, whose weights are what the codes stand for, with the codes beside
them. `teal calibrate --quantize` takes those codes in place of choosing its own; without it, the model
runs like any other.
"""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from teal_cli.checkpoint.export import companions
from teal_cli.checkpoint.weights import fingerprint, tensor_header, weight_files
from teal_cli.errors import ArtefactError, UsageError
from teal_cli.models.conversion import ELSEWHERE, converted_once
from teal_cli.models.loading import check_memory
from teal_cli.quantise.files import tensors_of
from teal_cli.quantise.scheme import Scheme
from teal_cli.reading import read_json
from teal_kernels.packing import Packed, dequantised, pack

_CODES = "codes-{}.safetensors"
_SHIFTS = {"gptq": (0, 4, 8, 12, 16, 20, 24, 28), "awq": (0, 16, 4, 20, 8, 24, 12, 28)}
"""Bits below each of a word's eight codes."""
_QUANTISED_KEYS = ("qweight", "qzeros", "scales", "g_idx")


def converted_published(folder: Path, say: Callable[[str], None]) -> Path:
    """The dense folder of such a model, with its codes, converted on first use.

    Raises:
        ArtefactError: other than 4 bits, groups that are not of neighbouring inputs, or damaged.
        MachineError: out of memory.
    """
    config = read_json(folder / "config.json", "model configuration")
    scheme_of(config, folder)
    return converted_once(
        f"{folder.resolve().name}-{fingerprint(folder)[:16]}",
        lambda temporary: _convert(folder, config, temporary),
        lambda target: say(f"laying out the codes of {folder.name} anew, once, into {target}"),
    )


def published_codes(folder: Path, scheme: Scheme) -> Path | None:
    """The codes that came with a dense folder, for a scheme of 4 bits; None where none came.

    Raises:
        UsageError: they are of another scheme.
    """
    found = next(iter(sorted(folder.glob(_CODES.format("*")))), None)
    if found is None or scheme.bits != 4:
        return None
    if found.name != _CODES.format(scheme.name):
        theirs = found.stem.removeprefix("codes-").replace("-", ":")
        raise UsageError(
            f"this model came with codes of {theirs}: quantize to that (flag --quantize {theirs}), not to {scheme.text}"
        )
    return found


def scheme_of(config: dict[str, Any], where: Path) -> Scheme:
    """How such a model is quantised.

    Raises:
        ArtefactError: in a way that cannot be taken over.
    """
    stored = config["quantization_config"]
    bits, group = stored.get("bits", stored.get("w_bit")), stored.get("group_size", stored.get("q_group_size"))
    form = stored.get("checkpoint_format", stored.get("version", "gptq"))
    if bits != 4:
        raise ArtefactError(f"{where} is quantised to {bits} bits; of GPTQ and AWQ models, those of 4 bits are read")
    if str(form).lower() not in ("gptq", "gptq_v2", "gemm"):
        raise ArtefactError(f"{where}: the format {form!r} of its codes is not read, only gptq, gptq_v2 and AWQ's gemm")
    try:
        return Scheme.parse(f"int4:{group}")
    except ValueError as error:
        raise ArtefactError(f"{where}: {error}") from error


def _convert(folder: Path, config: dict[str, Any], target: Path) -> None:
    scheme, method = scheme_of(config, folder), config["quantization_config"]["quant_method"]
    # GPTQ's first format keeps each zero point less one.
    offset = 1 if method == "gptq" and config["quantization_config"].get("checkpoint_format", "gptq") == "gptq" else 0
    dtype = getattr(torch, str(config.get("dtype", config.get("torch_dtype", "float16"))), torch.float16)
    _check_room(folder, dtype)
    layers: dict[str, dict[str, Tensor]] = {}
    tensors: dict[str, Tensor] = {}
    for shard in weight_files(folder):
        with safe_open(shard, framework="pt") as stream:
            for key in stream.keys():  # noqa: SIM118  (not a mapping)
                name, _, kind = key.rpartition(".")
                if kind in _QUANTISED_KEYS:
                    layers.setdefault(name, {})[kind] = stream.get_tensor(key)
                else:
                    tensors[key] = stream.get_tensor(key)
    packs = {name: _repacked(found, scheme, method, offset, f"{folder}: {name}") for name, found in layers.items()}
    for name, packed in packs.items():
        tensors[f"{name}.weight"] = dequantised(packed, dtype).t().contiguous()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    save_file(tensors_of(packs), target / _CODES.format(scheme.name))
    for file in companions(folder, with_index=False):
        shutil.copyfile(file, target / file.name)
    dense = {key: value for key, value in config.items() if key != "quantization_config"}
    (target / "config.json").write_text(json.dumps(dense, indent=2) + "\n", encoding="utf-8")


def _check_room(folder: Path, dtype: torch.dtype) -> None:
    """All that is stored, and the weights that the codes stand for, are in memory at one time."""
    entries = {key: entry for file in weight_files(folder) for key, entry in tensor_header(file).items()}
    stored = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in entries.values())
    codes = sum(8 * math.prod(entry["shape"]) for key, entry in entries.items() if key.endswith(".qweight"))
    check_memory(
        stored + codes * dtype.itemsize,
        torch.device("cpu"),
        f"laying out the codes of {folder} anew",
        ELSEWHERE,
    )


def _repacked(found: dict[str, Tensor], scheme: Scheme, method: str, offset: int, where: str) -> Packed:
    """One layer's codes, scales and zero points in our layout."""
    missing = [kind for kind in _QUANTISED_KEYS[:3] if kind not in found]
    if missing:
        raise ArtefactError(f"{where} has no {', '.join(missing)}: download the model again")
    shifts = torch.tensor(_SHIFTS[method])
    scales = found["scales"]
    zeros = _unpacked(found["qzeros"], shifts) + offset
    words = found["qweight"]  # of GPTQ they run along the inputs
    codes = _unpacked(words.t(), shifts).t() if method == "gptq" else _unpacked(words, shifts)
    group = scheme.group_of(len(codes))
    order = found.get("g_idx")
    if order is not None and not torch.equal(order.long(), torch.arange(len(codes)) // group):
        raise ArtefactError(
            f"{where} has groups of inputs that are not neighbours (desc_act): its codes cannot be taken over"
        )
    if scales.shape != (-(-len(codes) // group), codes.shape[1]) or zeros.shape != scales.shape:
        raise ArtefactError(f"{where}: scales of shape {tuple(scales.shape)} do not fit groups of {group}")
    return pack(codes.to(torch.uint8), scales.to(torch.float16), zeros.to(torch.float16), bits=4, group=group)


def _unpacked(words: Tensor, shifts: Tensor) -> Tensor:
    """(rows, words) int32 -> (rows, 8 words): every code, in order."""
    return (words.to(torch.int64)[..., None] >> shifts & 15).flatten(-2)
