"""The dense weights of a transformers folder: which files, whether whole, and their fingerprint."""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from teal_cli.checkpoint.files import update_with_samples
from teal_cli.errors import ArtefactError
from teal_cli.reading import read_json

_SAMPLES, _SAMPLE_BYTES = 8, 1024
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, each checked to be whole.

    Raises:
        ArtefactError: no safetensors weights, a shard missing, or a file truncated.
    """
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():  # transformers, too, takes this one first
        names = ["model.safetensors"]
    elif index.is_file():
        table = read_json(index, "weight index").get("weight_map")
        if not isinstance(table, dict) or not table:
            raise ArtefactError(f"weight index {index} has no weight_map; download the model again")
        names = sorted(set(table.values()))
    else:
        pickled = any(folder.glob("pytorch_model*.bin"))
        hint = (
            "it has only pickled weights, which teal never loads: convert them to safetensors"
            if pickled
            else ("expected model.safetensors or model.safetensors.index.json")
        )
        raise ArtefactError(f"model folder {folder} has no usable weights: {hint}")
    files = [folder / name for name in names]
    for file in files:
        if not file.is_file():
            raise ArtefactError(f"weight file {file} is missing; download the model again")
        tensor_header(file)
    return files


def tensor_header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file: tensor name -> dtype, shape, data_offsets.

    Raises:
        ArtefactError: not safetensors, or shorter or longer than its header says.
    """
    damaged = ArtefactError(f"weight file {file} is truncated or damaged; download or make it again")
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise damaged
        (length,) = struct.unpack("<Q", prefix)
        if length > min(size - 8, _MAX_HEADER_BYTES):
            raise damaged
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise damaged from error
    if 8 + length + end != size:
        raise damaged
    return header


def fingerprint(folder: Path) -> str:
    """Digest that tells one set of weights from another without reading all of them.

    Covers every tensor's name, dtype and shape, and eight samples of 1 KiB spread evenly over its
    data, the first and the last among them, so that a fine-tuned copy of the same shape differs.
    Independent of how the tensors are sharded.
    """
    return fingerprint_of(weight_files(folder))


def fingerprint_of(files: list[Path]) -> str:
    """The same of these safetensors files.

    Raises:
        ArtefactError: one is truncated or damaged.
    """
    lines: list[bytes] = []
    for file in files:
        header = tensor_header(file)
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            for name, entry in header.items():
                begin, end = entry["data_offsets"]
                digest = hashlib.sha256()
                update_with_samples(digest, stream, 8 + length + begin, end - begin, count=_SAMPLES, size=_SAMPLE_BYTES)
                lines.append(f"{name}|{entry['dtype']}|{entry['shape']}|{digest.hexdigest()}".encode())
    return hashlib.sha256(b"\n".join(sorted(lines))).hexdigest()
