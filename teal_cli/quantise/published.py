"""Checkpoints that GPTQ or AWQ quantised to 4 bits: laid out anew, every code, scale and zero point as it was.

Such a folder becomes a dense one, whose weights are what the codes stand for, with the codes beside
them. `teal calibrate --quantise` takes those codes in place of choosing its own; without it, the model
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

from teal_cli.atomic import file_digest
from teal_cli.errors import ArtefactError, UsageError
from teal_cli.models.companions import companion_files
from teal_cli.models.config_checks import named_dtype
from teal_cli.models.conversion import ELSEWHERE, conversion_folder, converted_once
from teal_cli.models.loading import check_memory
from teal_cli.models.weights import fingerprint, floating_dtype, tensor_header, weight_files
from teal_cli.quantise.published_config import Published, published_format
from teal_cli.quantise.storage import tensors_of
from teal_cli.reading import read_json
from teal_cli.schemes import Scheme
from teal_kernels.packing import Packed, dequantised, pack

_CODES = "codes-{}.safetensors"
_SHIFTS = {"gptq": (0, 4, 8, 12, 16, 20, 24, 28), "awq": (0, 16, 4, 20, 8, 24, 12, 28)}
"""Bits below each of a word's eight codes."""
_ONES = 0x11111111
"""A one in each of a word's eight codes."""
_QUANTISED_KEYS = ("qweight", "qzeros", "scales", "g_idx")
"""What GPTQ and AWQ store of a layer; AWQ without the last."""


def converted_published(folder: Path, say: Callable[[str], None]) -> Path:
    """The dense folder of such a model, with its codes, converted on first use.

    Raises:
        ArtefactError: other than 4 bits, a layout that is not read, groups that are not of neighbouring inputs, or
            damaged.
        MachineError: out of memory, or the folder cannot be written.
    """
    config = read_json(folder / "config.json", "model configuration")
    form = published_format(config, folder)
    target = conversion_folder(folder.resolve().name, _identity(folder, config))
    if not target.is_dir():
        _check_layers(folder, form)
    return converted_once(
        target,
        lambda temporary: _convert(folder, config, form, temporary),
        lambda target: say(f"laying out the codes of {folder.name} anew, once, into {target}"),
    )


def _identity(folder: Path, config: dict[str, Any]) -> str:
    """Everything that the conversion is made from: weights, configuration, and the files that are copied."""
    copied = {file.name: file_digest(file) for file in companion_files(folder, with_index=False)}
    return json.dumps([fingerprint(folder), config, copied], sort_keys=True)


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
            f"this model came with codes of {theirs}: quantise to that (flag --quantise {theirs}), not to {scheme.text}"
        )
    return found


def _check_layers(folder: Path, form: Published) -> None:
    """Refuse, by headers and group indices, layers that `_repacked` cannot read.

    Raises:
        ArtefactError: no layer with codes, or one whose tensors do not fit together.
    """
    layers: dict[str, dict[str, tuple[Path, dict[str, Any]]]] = {}
    for file in weight_files(folder):
        for key, entry in tensor_header(file).items():
            name, _, kind = key.rpartition(".")
            if kind in _QUANTISED_KEYS:
                layers.setdefault(name, {})[kind] = (file, entry)
    if not layers:
        raise ArtefactError(
            f"config.json of {folder} says that {form.method} quantised the weights, but they hold no codes: "
            "download the model again"
        )
    for name, found in layers.items():
        where = f"{folder}: {name}"
        wanted = (*_QUANTISED_KEYS[:3], *(("g_idx",) if form.is_reordered else ()))
        missing = [kind for kind in wanted if kind not in found]
        if missing:
            raise ArtefactError(f"{where} has no {', '.join(missing)}: download the model again")
        _check_shapes({kind: entry for kind, (_, entry) in found.items()}, form, where)
        if form.method == "gptq" and "g_idx" in found:
            with safe_open(found["g_idx"][0], framework="pt") as stream:
                order = stream.get_tensor(f"{name}.g_idx").long()
            if not torch.equal(order, torch.arange(len(order)) // form.scheme.group_of(len(order))):
                raise ArtefactError(
                    f"{where} has groups of inputs that are not neighbours (desc_act): its codes cannot be taken over"
                )


def _check_shapes(entries: dict[str, dict[str, Any]], form: Published, where: str) -> None:
    """Whether codes, zero points and scales of one layer go together."""
    kinds = {kind: (entry["dtype"], tuple(entry["shape"])) for kind, entry in entries.items()}
    (codes, words), (zeros, shape_of_zeros), (scales, shape) = (kinds[kind] for kind in _QUANTISED_KEYS[:3])
    if (codes, zeros) != ("I32", "I32") or scales not in ("F16", "BF16", "F32"):
        raise ArtefactError(f"{where} stores codes as {codes}, zero points as {zeros} and scales as {scales}")
    if len(words) != 2 or len(shape) != 2:
        raise ArtefactError(f"{where}: codes of shape {words} and scales of shape {shape} are no matrices")
    inputs, outputs = (8 * words[0], words[1]) if form.method == "gptq" else (words[0], 8 * words[1])
    groups = -(-inputs // form.scheme.group_of(inputs)) if inputs else 0
    indices = kinds.get("g_idx", ("I32", (inputs,)))
    if shape != (groups, outputs) or shape_of_zeros != (groups, outputs // 8) or outputs % 8 or not groups:
        raise ArtefactError(
            f"{where}: scales of shape {shape} and zero points of shape {shape_of_zeros} do not fit codes of "
            f"{inputs} inputs in groups of {form.scheme.group}"
        )
    if form.method == "gptq" and (indices[0] not in ("I32", "I64") or indices[1] != (inputs,)):
        raise ArtefactError(f"{where}: g_idx of shape {indices[1]} does not fit {inputs} inputs")


def _convert(folder: Path, config: dict[str, Any], form: Published, target: Path) -> None:
    entries = [entry for file in weight_files(folder) for entry in tensor_header(file).values()]
    dtype = getattr(torch, named_dtype(config) or floating_dtype(entries) or "float16")
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
    packs = {name: _repacked(found, form, f"{folder}: {name}") for name, found in layers.items()}
    for name, packed in packs.items():
        tensors[f"{name}.weight"] = dequantised(packed, dtype).t().contiguous()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    save_file(tensors_of(packs), target / _CODES.format(form.scheme.name))
    for file in companion_files(folder, with_index=False):
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


def _repacked(found: dict[str, Tensor], form: Published, where: str) -> Packed:
    """One layer's codes, scales and zero points in our layout; they fit together (`_check_layers`)."""
    shifts = torch.tensor(_SHIFTS[form.method])
    scales = found["scales"].to(torch.float16)
    if not torch.equal(scales.to(found["scales"].dtype), found["scales"]) or not scales.isfinite().all():
        raise ArtefactError(f"{where} has scales that float16 cannot hold: its codes cannot be taken over")
    words = found["qweight"]  # of GPTQ they run along the inputs
    codes = _unpacked(words.t(), shifts).t() if form.method == "gptq" else _unpacked(words, shifts)
    zeros = _zero_points(found["qzeros"], shifts, form)
    group = form.scheme.group_of(len(codes))
    return pack(codes.to(torch.uint8), scales, zeros.to(torch.float16), bits=4, group=group)


def _zero_points(words: Tensor, shifts: Tensor, form: Published) -> Tensor:
    """(groups, words) int32 -> (groups, outputs): zero points from 0 to 15.

    GPTQ's first format keeps them less one: auto_gptq took it from each, gptqmodel from whole words, which
    differs after a zero point of 0. Some checkpoints claim that format and keep them as they are; where
    quantisation is symmetric, that shows: no zero point is 9.
    """
    stored = _unpacked(words, shifts)
    if not form.is_less_one or (form.is_symmetric and bool((stored == 8).all())):
        return stored
    return _unpacked(words + _ONES, shifts) if form.carries else (stored + 1) & 15


def _unpacked(words: Tensor, shifts: Tensor) -> Tensor:
    """(rows, words) int32 -> (rows, 8 words): every code, in order."""
    return (words.to(torch.int64)[..., None] >> shifts & 15).flatten(-2)
