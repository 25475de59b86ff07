"""The dense weights of a transformers folder: which files, whether whole, and their fingerprint."""

import hashlib
import json
import math
import struct
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from teal_cli.atomic import update_with_samples
from teal_cli.errors import ArtefactError, shown
from teal_cli.reading import read_json

_SAMPLES, _SAMPLE_BYTES = 8, 1024
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Of an element of each dtype of the safetensors format."""
_MOST_BYTES = 1 << 63
_MOST_DIMENSIONS = 64
_FLOATING = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, each checked to be whole.

    Raises:
        ArtefactError: no safetensors weights, a shard missing, or a file truncated.
    """
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():  # transformers, too, takes this one first
        names = ["model.safetensors"]
    elif index.exists():
        table = read_json(index, "weight index").get("weight_map")
        if not isinstance(table, dict) or not table:
            raise ArtefactError(f"weight index {index} has no weight_map; download the model again")
        names = sorted(set(map(_shard_name, table.values())))
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
            state = "is not an ordinary file" if file.exists() else "is missing"
            raise ArtefactError(f"weight file {file} {state}; download the model again")
        tensor_header(file)
    return files


def _shard_name(name: object) -> str:
    """What a weight index names, if that is a file of its folder.

    Raises:
        ArtefactError: something else.
    """
    if not isinstance(name, str) or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ArtefactError(
            f"model.safetensors.index.json names {shown(name)} as a weight file, which is no file of the model's "
            "folder; download the model again"
        )
    return name


def tensor_header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file: tensor name -> dtype, shape, data_offsets.

    Raises:
        ArtefactError: not safetensors, shorter or longer than its header says, or a header that contradicts itself.
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
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError) as error:
            raise damaged from error
    if not isinstance(header, dict):
        raise damaged
    header.pop("__metadata__", None)
    spans = []
    for name, entry in header.items():
        span = _span(entry)
        if span is None:
            raise ArtefactError(
                f"weight file {file} is damaged: its header says of tensor {shown(name)} what cannot be; download or "
                "make it again"
            )
        spans.append(span)
    # One after the other, without gaps: so the format is defined, and so no tensor can lie in another.
    end = 0
    for begin, following in sorted(spans):
        if begin != end:
            raise damaged
        end = following
    if 8 + length + end != size:
        raise damaged
    return header


def _span(entry: object) -> tuple[int, int] | None:
    """Where a tensor's bytes begin and end; None where its entry in a header cannot be."""
    if not isinstance(entry, dict):
        return None
    shape, offsets, dtype = entry.get("shape"), entry.get("data_offsets"), entry.get("dtype")
    bits = _BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None or not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        return None
    if any(type(number) is not int or not 0 <= number < _MOST_BYTES for number in (*shape, *offsets)):
        return None
    begin, end = offsets
    return (begin, end) if len(shape) <= _MOST_DIMENSIONS and math.prod(shape) * bits == 8 * (end - begin) else None


def floating_dtype(entries: Iterable[dict[str, Any]]) -> str | None:
    """The dtype that most of the stored values have: float32, float16 or bfloat16; None where none has one of these.

    Args:
        entries: of `tensor_header`.
    """
    values: Counter[str] = Counter()
    for entry in entries:
        if entry["dtype"] in _FLOATING:
            values[_FLOATING[entry["dtype"]]] += math.prod(entry["shape"])
    return values.most_common(1)[0][0] if values else None


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
