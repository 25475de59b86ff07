"""Full digests of a checkpoint: sha256 of every tensor and every other file, which the fingerprint only samples."""

import hashlib
import json
import os
import struct
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from teal_cli.atomic import file_digest
from teal_cli.models.weights import tensor_header
from teal_cli.reading import read_json

_NOT_OF_THE_FORWARD = {
    *("quantization_config", "tie_word_embeddings", "transformers_version", "_name_or_path", "architectures"),
    *("dtype", "torch_dtype", "use_cache", "auto_map"),
}
_PIECE = 4 << 20
_READ = (".json", ".jinja", ".txt", ".model")
_MOST_THREADS = 8
"""hashlib lets other threads run; more than these wait for memory and disk."""


def configuration_digest(folder: Path) -> str:
    """sha256, in hex, of what a model's config.json says about its forward.

    Left out: what an export changes or adds, names and versions, and the dtype, which is chosen by a flag.

    Raises:
        ArtefactError: no such file, or not JSON.
    """
    content = read_json(folder / "config.json", "model configuration")
    said = {key: value for key, value in content.items() if key not in _NOT_OF_THE_FORWARD}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def tensor_digests(files: Iterable[Path], *, again: bool = False) -> dict[str, str]:
    """sha256, in hex, of every tensor's bytes, whichever file it lies in.

    Args:
        files: safetensors.
        again: read them even where this process has, and their times say that they are the same.

    Raises:
        ArtefactError: one is truncated or damaged.
    """
    found: dict[str, str] = {}
    for file in files:
        status = file.stat()
        identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        found |= _of_file.__wrapped__(file) if again else _of_file(file, *identity)
    return found


@lru_cache(maxsize=256)
def _of_file(file: Path, *identity: int) -> dict[str, str]:
    """The digests of one file's tensors; the exports of one command share their weights."""
    header = tensor_header(file)
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        descriptor = stream.fileno()

        def digest_of(name: str) -> str:
            begin, end = (8 + length + offset for offset in header[name]["data_offsets"])
            digest = hashlib.sha256()
            for start in range(begin, end, _PIECE):
                digest.update(os.pread(descriptor, min(_PIECE, end - start), start))
            return digest.hexdigest()

        with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
            return dict(zip(header, pool.map(digest_of, header), strict=True))


def file_digests(folder: Path) -> dict[str, str]:
    """sha256, in hex, of the files that a model is loaded from, beside its weights: not of what is for people."""
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and file.suffix in _READ]
    return {file.name: file_digest(file) for file in files}
