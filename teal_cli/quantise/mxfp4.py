"""Checkpoints whose experts are in MXFP4 (gpt-oss as it is published): dequantised once, exactly.

Two values of four bits share a byte, and 32 values along the inputs share a power of two (OCP Microscaling Formats).
bfloat16 holds each product. Such a folder becomes a dense one under TEAL_HOME, with the weights as transformers names
them, four times as large.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from teal_cli.atomic import file_digest
from teal_cli.errors import ArtefactError
from teal_cli.models.companions import companion_files
from teal_cli.models.conversion import ELSEWHERE, conversion_folder, converted_once
from teal_cli.models.loading import check_memory
from teal_cli.models.weights import fingerprint, tensor_header, weight_files
from teal_cli.reading import read_json

_BLOCKS, _SCALES = "_blocks", "_scales"
_GROUP = 32
"""Values that share a scale."""
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of a code's three low bits; the fourth is the sign."""
_ONE = 127
"""The scale that is 1."""
_SHARD_BYTES = 4 << 30
_DTYPE = torch.bfloat16


def converted_mxfp4(folder: Path, say: Callable[[str], None]) -> Path:
    """The dense folder of such a model, converted on first use.

    Raises:
        ArtefactError: codes and scales do not belong together, or there are none.
        MachineError: out of memory, or the folder cannot be written.
    """
    config = read_json(folder / "config.json", "model configuration")
    copied = {file.name: file_digest(file) for file in companion_files(folder, with_index=False)}
    identity = json.dumps(["mxfp4", fingerprint(folder), config, copied], sort_keys=True)
    target = conversion_folder(folder.resolve().name, identity)
    if not target.is_dir():
        _check(folder)
    return converted_once(
        target,
        lambda temporary: _convert(folder, config, temporary),
        lambda target: say(f"dequantising the experts of {folder.name} (MXFP4), once, into {target}"),
    )


def _entries(folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Of every tensor its file and its header."""
    return {key: (file, entry) for file in weight_files(folder) for key, entry in tensor_header(file).items()}


def _check(folder: Path) -> None:
    """Refuse, by headers, codes that `dequantised_mxfp4` cannot read, and what memory cannot hold."""
    entries = _entries(folder)
    names = [key.removesuffix(_BLOCKS) for key in entries if key.endswith(_BLOCKS)]
    if not names:
        raise ArtefactError(
            f"config.json of {folder} says that the weights are in MXFP4, but they hold no codes: "
            "download the model again"
        )
    largest = 0
    for name in names:
        shape = entries[f"{name}{_BLOCKS}"][1]["shape"]
        scales = entries.get(f"{name}{_SCALES}", (None, {"shape": None, "dtype": None}))[1]
        kinds = {entries[f"{name}{_BLOCKS}"][1]["dtype"], scales["dtype"]}
        if kinds != {"U8"} or len(shape) != 4 or shape[3] != _GROUP // 2 or scales["shape"] != shape[:3]:
            raise ArtefactError(
                f"{folder}: codes of {name} of shape {shape} and scales of shape {scales['shape']} do not belong "
                "together: download the model again"
            )
        largest = max(largest, 2 * math.prod(shape) * _DTYPE.itemsize)
    check_memory(_SHARD_BYTES + 2 * largest, torch.device("cpu"), f"dequantising {folder}", ELSEWHERE)


def dequantised_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """(experts, out, groups, 16) codes and (experts, out, groups) scales, uint8 -> (experts, in, out) bfloat16.

    The lower four bits of a byte come first.
    """
    experts, outputs, groups, _ = blocks.shape
    values = torch.tensor((*_VALUES, *(-value for value in _VALUES)), dtype=_DTYPE)
    weights = torch.empty(experts, groups * _GROUP, outputs, dtype=_DTYPE)
    for weight, codes, exponents in zip(weights, blocks.int(), scales.int(), strict=True):
        pairs = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)  # (out, groups, 32)
        scaled = torch.ldexp(values[pairs].float(), exponents[..., None] - _ONE)
        weight.copy_(scaled.flatten(1).t())
    return weights


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the dense model, by transformers' name."""
    entries = _entries(folder)

    def read(key: str) -> Tensor:
        with safe_open(entries[key][0], framework="pt") as stream:
            tensor: Tensor = stream.get_tensor(key)
        return tensor

    for key in entries:
        name = key.removesuffix(_BLOCKS)
        if name != key:
            yield name, dequantised_mxfp4(read(key), read(f"{name}{_SCALES}"))
        elif f"{key.removesuffix(_SCALES)}{_BLOCKS}" not in entries:
            yield key, read(key)


def _convert(folder: Path, config: dict[str, Any], target: Path) -> None:
    index: dict[str, str] = {}
    shard: dict[str, Tensor] = {}

    def write() -> None:
        name = f"model-{len(set(index.values())) + 1:05}.safetensors"
        save_file(shard, target / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, name))
        shard.clear()

    for key, tensor in _tensors(folder):
        if shard and sum(known.nbytes for known in (*shard.values(), tensor)) > _SHARD_BYTES:
            write()
        shard[key] = tensor
    write()
    content = {"metadata": {}, "weight_map": index}
    (target / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for file in companion_files(folder, with_index=False):
        shutil.copyfile(file, target / file.name)
    dense = {key: value for key, value in config.items() if key != "quantization_config"}
    (target / "config.json").write_text(json.dumps(dense, indent=2) + "\n", encoding="utf-8")
