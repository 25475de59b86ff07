"""The header of a GGUF file: read with bounds, before a library that believes its counts sees the file.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teal_cli.errors import ArtefactError, shown
from teal_cli.reading import is_ordinary

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MOST_KEYS, _MOST_TENSORS, _MOST_DIMENSIONS = 1 << 12, 1 << 17, 4
_MOST_ELEMENTS = 4_000_000
"""Of all arrays together. The largest vocabularies have a million entries with their merges."""
_LONGEST_STRING = 1 << 20
_ALIGNMENT = 32
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})")


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in a file."""

    name: bytes
    shape: tuple[int, ...]
    """Innermost dimension first, as the format has it."""
    kind: int
    """A number of ggml's types."""
    offset: int
    """From the beginning of the data."""


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says of itself."""

    file: Path
    keys: int
    values: dict[str, Any]
    """Numbers, truth values and strings, by key. Arrays are left out."""
    metadata: tuple[int, int]
    """Where the keys and values begin and end in the file."""
    tensors: list[TensorInfo]
    data: tuple[int, int]
    """Where the data of the tensors begin and end."""

    @property
    def elements(self) -> int:
        """Weights in all tensors."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    @property
    def alignment(self) -> int:
        """What the offsets of tensors are multiples of."""
        found = self.values.get("general.alignment", _ALIGNMENT)
        if type(found) is not int or not 0 < found <= 1 << 20 or found & (found - 1):
            raise _damaged(self.file, f"general.alignment is {shown(found)}")
        return found


def read_header(file: Path) -> GgufHeader:
    """The header of a GGUF file, checked against its size.

    Raises:
        ArtefactError: not an ordinary file, not GGUF, of another version, truncated, or with counts that cannot be.
    """
    check_magic(file)
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        try:
            return _Cursor(file, content).header()
        except struct.error as error:
            raise _damaged(file, "it ends within its header") from error


def check_magic(file: Path) -> None:
    """Refuse what is no GGUF file by its first bytes.

    Raises:
        ArtefactError: see above.
    """
    try:
        status = file.stat()
    except OSError as error:
        raise ArtefactError(f"GGUF file {file} does not exist") from error
    if not is_ordinary(status):
        raise ArtefactError(f"GGUF file {file} is not an ordinary file")
    with file.open("rb") as stream:
        if stream.read(len(_MAGIC)) != _MAGIC:
            raise ArtefactError(f"{file} is not a GGUF file")


def stem_of(file: Path) -> str:
    """What the model of a file is called: of a part of a split file without the number of the part."""
    found = _PART.fullmatch(file.stem)
    return found["stem"] if found is not None else file.stem


def parts_of(file: Path) -> list[Path]:
    """All parts of the file that a part belongs to, in order; the file itself where its name is not that of a part.

    Raises:
        ArtefactError: a part is missing.
    """
    found = _PART.fullmatch(file.stem)
    if found is None:
        return [file]
    count = int(found["count"])
    parts = [file.with_name(f"{found['stem']}-{n:05d}-of-{count:05d}{file.suffix}") for n in range(1, count + 1)]
    missing = next((part for part in parts if not part.exists()), None)
    if missing is not None or file not in parts:
        raise ArtefactError(
            f"{file} is one of {count} parts of a split GGUF file, and {(missing or file).name} is missing: put all "
            "parts into one folder"
        )
    return parts


def check_parts(headers: list[GgufHeader]) -> None:
    """Refuse files that are not all parts of one, in order.

    Raises:
        ArtefactError: see above, or a tensor that two parts have.
    """
    for number, header in enumerate(headers):
        count, own = header.values.get("split.count", 1), header.values.get("split.no", 0)
        if len(headers) == 1 and count > 1:
            raise ArtefactError(
                f"{header.file} is part {own + 1} of {count} of a split GGUF file: give the parts the names that "
                "gguf-split gives (NAME-00001-of-0000N.gguf), in one folder"
            )
        if count != len(headers) or own != number:
            raise ArtefactError(
                f"{header.file} says that it is part {own + 1} of {count}, but by its name it is part {number + 1} of "
                f"{len(headers)}: download the parts again"
            )
    names = [tensor.name for header in headers for tensor in header.tensors]
    total = headers[0].values.get("split.tensors.count", len(names)) if len(headers) > 1 else len(names)
    if len(set(names)) != len(names) or total != len(names):
        raise _damaged(headers[0].file, f"its parts have {len(names)} tensors, some twice or not {shown(total)}")


def merge(headers: list[GgufHeader], target: Path) -> None:
    """Write all parts of a split file as one: the first part's metadata, everybody's tensors.

    Args:
        headers: of the parts, in order (`check_parts`).
        target: where to.
    """
    first = headers[0]
    align = max(header.alignment for header in headers)
    bases, end = [], 0
    for header in headers:
        bases.append(end)
        end += -(-(header.data[1] - header.data[0]) // align) * align
    with target.open("wb") as stream, first.file.open("rb") as source:
        count = sum(len(header.tensors) for header in headers)
        stream.write(_MAGIC + struct.pack("<IQQ", _VERSIONS[-1], count, first.keys))
        source.seek(first.metadata[0])
        stream.write(source.read(first.metadata[1] - first.metadata[0]))
        for base, header in zip(bases, headers, strict=True):
            for tensor in header.tensors:
                stream.write(struct.pack("<Q", len(tensor.name)) + tensor.name)
                stream.write(struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape))
                stream.write(struct.pack("<IQ", tensor.kind, base + tensor.offset))
        start = -(-stream.tell() // first.alignment) * first.alignment
        for base, header in zip(bases, headers, strict=True):
            stream.seek(start + base)
            _copy(header, stream)
        stream.truncate(max(stream.tell(), start + end))


def _copy(header: GgufHeader, stream: Any) -> None:
    left = header.data[1] - header.data[0]
    with header.file.open("rb") as source:
        source.seek(header.data[0])
        while left > 0 and (chunk := source.read(min(left, 1 << 24))):
            stream.write(chunk)
            left -= len(chunk)


class _Cursor:
    """A place in a file, moved by what is read."""

    def __init__(self, file: Path, content: mmap.mmap) -> None:
        self.file, self.content, self.at = file, content, len(_MAGIC)
        self.elements = 0

    def header(self) -> GgufHeader:
        version = self._number("<I")
        if version not in _VERSIONS:
            kind = "is big-endian or damaged" if version & 0xFFFF == 0 else f"has version {version}"
            raise ArtefactError(f"GGUF file {self.file} {kind}: little-endian files of versions 2 and 3 are read")
        tensors, keys = self._number("<Q"), self._number("<Q")
        if tensors > _MOST_TENSORS or keys > _MOST_KEYS:
            raise _damaged(self.file, f"its header speaks of {tensors:,} tensors and {keys:,} keys")
        begin = self.at
        values = {}
        for _ in range(keys):
            key = self._string().decode("utf-8", "replace")
            value = self._value(self._number("<I"))
            if value is not None:
                values[key] = value
        metadata = (begin, self.at)
        infos = [self._tensor() for _ in range(tensors)]
        found = GgufHeader(self.file, keys, values, metadata, infos, (self.at, len(self.content)))
        start = -(-self.at // found.alignment) * found.alignment
        return GgufHeader(self.file, keys, values, metadata, infos, (start, max(start, len(self.content))))

    def _number(self, form: str) -> Any:
        (found,) = struct.unpack_from(form, self.content, self.at)
        self.at += struct.calcsize(form)
        return found

    def _skip(self, size: int) -> int:
        """Where a stretch begins that ends where reading goes on."""
        begin = self.at
        if size > len(self.content) - begin:
            raise _damaged(self.file, "it ends within its header")
        self.at += size
        return begin

    def _string(self) -> bytes:
        size = self._number("<Q")
        begin = self._skip(size)
        return b"" if size > _LONGEST_STRING else self.content[begin : begin + size]

    def _value(self, kind: int) -> Any:
        """A scalar or a string; None for an array, which is passed over."""
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._string().decode("utf-8", "replace")
        if kind != _ARRAY:
            raise _damaged(self.file, f"it has a value of type {kind}")
        of, count = self._number("<I"), self._number("<Q")
        self.elements += count
        if self.elements > _MOST_ELEMENTS or of not in (*_SCALARS, _STRING):
            raise _damaged(self.file, f"it has an array of {count:,} values of type {of}")
        if of == _STRING:
            for _ in range(count):
                self._skip(self._number("<Q"))
        else:
            self._skip(count * struct.calcsize(_SCALARS[of]))
        return None

    def _tensor(self) -> TensorInfo:
        name, dimensions = self._string(), self._number("<I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise _damaged(self.file, f"tensor {shown(name)} has {dimensions} dimensions")
        shape = tuple(self._number("<Q") for _ in range(dimensions))
        if min(shape) < 1:
            raise _damaged(self.file, f"tensor {shown(name)} has the shape {shown(shape)}")
        return TensorInfo(name, shape, self._number("<I"), self._number("<Q"))


def check_data(header: GgufHeader, sizes: dict[int, tuple[int, int]]) -> None:
    """Refuse tensors that do not lie within the file.

    Args:
        header: the file's.
        sizes: ggml type -> values and bytes of a block.

    Raises:
        ArtefactError: see above, or a type that is not among them.
    """
    for tensor in header.tensors:
        if tensor.kind not in sizes:
            raise ArtefactError(
                f"{header.file}: tensor {shown(tensor.name)} has the type {tensor.kind}, which this version of the "
                "package gguf does not know: update it"
            )
        values, size = sizes[tensor.kind]
        if tensor.offset + math.prod(tensor.shape) // values * size > header.data[1] - header.data[0]:
            raise _damaged(header.file, f"tensor {shown(tensor.name)} lies beyond its end")


def _damaged(file: Path, reason: str) -> ArtefactError:
    return ArtefactError(f"GGUF file {file} is truncated or damaged: {reason}; download it again")
