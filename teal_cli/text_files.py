"""Text files as documents: exactly the file that was named, read line by line where it has lines.

Nothing here treats a path as a pattern or guesses a type. A .jsonl file stays on disk: what is kept of it is where
its documents begin.
"""

import codecs
import json
import stat
from abc import abstractmethod
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, overload

from teal_cli.errors import ArtefactError, UsageError, shortened, shown
from teal_cli.reading import is_ordinary, read_bytes

COLUMN = "text"
"""The field of a .jsonl file that holds the text, unless another is named."""
_MOST_BYTES = 1 << 30
"""A .txt file is one document, which is held in memory."""
_MOST_LINE_BYTES = 64 << 20
_LONGEST_PATH = 300
_OTHER_ENCODINGS = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


class TextFile:
    """A text file that a dataset names: FILE.txt, FILE.jsonl or FILE.jsonl:COLUMN, in any case.

    Args:
        path: of the file.
        column: of a .jsonl file.
    """

    def __init__(self, path: Path, column: str = COLUMN) -> None:
        self.path, self.column = path, column

    @classmethod
    def named(cls, dataset: str) -> "TextFile | None":
        """The file that a name stands for, whether it is there or not; None of a name of another kind.

        A file whose whole name is given wins over one with a column.
        """
        path = _expanded(dataset)
        if path is None:
            return None
        if _exists(path) or _is_text(path):
            return cls(path)
        before, _, column = dataset.rpartition(":")
        path = _expanded(before)
        if path is not None and column and _is_text(path):
            return cls(path, column)
        return None

    @property
    def identity(self) -> str:
        """As artefacts record it: the full path, and the column where it is not `text`."""
        return str(self.path.resolve()) + ("" if self.column == COLUMN else f":{self.column}")

    @property
    def _shown(self) -> str:
        """The path in a message; what is longer than paths are is cut."""
        return shortened(str(self.path), _LONGEST_PATH)

    def check(self) -> None:
        """Refuse what cannot be read, without reading it.

        Raises:
            ArtefactError: no such file, of another kind, empty, or not an ordinary file.
            UsageError: a column of a .txt file.
        """
        name = f"text file {self._shown}"
        try:
            status = self.path.stat()
        except FileNotFoundError as error:
            raise ArtefactError(f"{name} does not exist") from error
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise ArtefactError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}") from error
        if stat.S_ISDIR(status.st_mode):
            raise ArtefactError(f"dataset {self._shown} must be a .txt or .jsonl file, and it is a folder here")
        if not is_ordinary(status):
            raise ArtefactError(f"{name} is not an ordinary file")
        if not _is_text(self.path):
            advice = "; write it as .jsonl, one object a line" if self.path.suffix.lower() == ".json" else ""
            raise ArtefactError(f"dataset {self._shown} must be a .txt or .jsonl file{advice}")
        if status.st_size == 0:
            raise ArtefactError(f"{name} is empty")
        if self.path.suffix.lower() == ".txt":
            if self.column != COLUMN:
                raise UsageError(f"{name} has no columns: leave out :{shown(self.column)}")
            if status.st_size > _MOST_BYTES:
                raise ArtefactError(
                    f"{name} has {status.st_size:,} bytes; one document has at most {_MOST_BYTES:,}: "
                    "write it as .jsonl, one document a line"
                )

    def documents(self) -> Sequence[str]:
        """Its documents that are not blank: one of a .txt file, one a line of a .jsonl file.

        Raises:
            ArtefactError: not UTF-8, not text, a line that is not an object with a text, or no text at all.
        """
        self.check()
        try:
            if self.path.suffix.lower() == ".txt":
                return [self._text()]
            return JsonLines(self.path, self.column)
        except OSError as error:
            raise ArtefactError(f"text file {self.path} cannot be read: {error.strerror or error}") from error

    def _text(self) -> str:
        content = read_bytes(self.path, "text file", most=_MOST_BYTES)
        name = f"text file {self.path}"
        text = _decoded(content, name)
        if "\0" in text:
            raise ArtefactError(f"{name} holds a NUL character (byte {content.index(0)}): it is not text")
        if not text.strip():
            raise ArtefactError(f"{name} is empty")
        # Line ends as Python reads them in text mode.
        return text.replace("\r\n", "\n").replace("\r", "\n")


class Documents(Sequence[str]):
    """Texts that stay where they are; each is read when it is asked for."""

    @abstractmethod
    def text_at(self, index: int) -> str:
        """Read one."""

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self.text_at(each) for each in range(*index.indices(len(self)))]
        return self.text_at(index)


class JsonLines(Documents):
    """The texts of a .jsonl file, each read when it is asked for.

    Args:
        path: of a regular file; every line is checked once.
        column: the field with the text. Lines without it, or with null or blank text, are left out.

    Raises:
        ArtefactError: a line that is not UTF-8 or not an object, a text that is not a string, or no text at all.
    """

    def __init__(self, path: Path, column: str) -> None:
        self.path, self.column = path, column
        self._offsets = array("q")
        self._numbers = array("q")
        seen: dict[str, None] = {}
        with path.open("rb") as stream:
            for number, offset, line in _lines(stream, path):
                found = self._parsed(line, number)
                if len(seen) < 100:
                    seen |= dict.fromkeys(found)
                if self._text_of(found, number).strip():
                    self._offsets.append(offset)
                    self._numbers.append(number)
        if not self._offsets:
            if seen and column not in seen:
                fields = ", ".join(shown(name) for name in list(seen)[:10])
                raise ArtefactError(
                    f"text file {path} has no column {shown(column)}, but {fields}; name the one with the text: "
                    "FILE.jsonl:COLUMN"
                )
            raise ArtefactError(f"text file {path} is empty")

    def __len__(self) -> int:
        return len(self._offsets)

    def text_at(self, index: int) -> str:
        """Read one line anew."""
        number = self._numbers[index]
        with self.path.open("rb") as stream:
            stream.seek(self._offsets[index])
            return self._text_of(self._parsed(stream.readline(_MOST_LINE_BYTES), number), number)

    def _parsed(self, line: bytes, number: int) -> dict[str, object]:
        """The object of one line."""
        name = f"text file {self.path}, line {number}"
        try:
            found = _DECODER.decode(_decoded(line, name))
        except json.JSONDecodeError as error:
            raise ArtefactError(
                f"{name} cannot be read: it is not JSON ({error.msg} at character {error.colno})"
            ) from error
        except RecursionError as error:
            raise ArtefactError(f"{name} cannot be read: it is nested too deep") from error
        if not isinstance(found, dict):
            raise ArtefactError(f"{name} is not an object with a field {shown(self.column)}: each line must be one")
        return found

    def _text_of(self, found: dict[str, object], number: int) -> str:
        """The text of one line; empty where it has none."""
        text = found.get(self.column)
        if text is None:
            return ""
        name = f"text file {self.path}, line {number}: {shown(self.column)}"
        if not isinstance(text, str):
            advice = "; join it to one string" if isinstance(text, list) else ""
            raise ArtefactError(f"{name} is {_KINDS.get(type(text), 'an object')}, not a string{advice}")
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ArtefactError(f"{name} holds half a character (a lone surrogate)") from error
        return text


_DECODER = json.JSONDecoder(parse_int=float)
"""Numbers are not looked at; Python refuses whole ones of more than 4,300 digits."""
_KINDS: dict[type, str] = {list: "a list", float: "a number", bool: "true or false"}


def _lines(stream: BinaryIO, path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Number, offset and content of each line that is not blank."""
    offset, number = 0, 0
    while line := stream.readline(_MOST_LINE_BYTES):
        number += 1
        if len(line) == _MOST_LINE_BYTES:
            raise ArtefactError(f"text file {path}, line {number} has more than {_MOST_LINE_BYTES:,} bytes")
        if line.removeprefix(codecs.BOM_UTF8).strip():
            yield number, offset, line
        offset += len(line)


def _decoded(content: bytes, name: str) -> str:
    """UTF-8, with or without a byte order mark.

    Raises:
        ArtefactError: another encoding.
    """
    for mark, encoding in _OTHER_ENCODINGS.items():
        if content.startswith(mark):
            raise ArtefactError(f"{name} cannot be read: it is {encoding}; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ArtefactError(
            f"{name} cannot be read: it is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error


def _is_text(path: Path) -> bool:
    return path.suffix.lower() in (".txt", ".jsonl")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _expanded(name: str) -> Path | None:
    """The path of a name: as it stands if there is such a file, else with ~ for the home folder."""
    path = Path(name)
    if not name or _exists(path) or not name.startswith("~"):
        return path if name else None
    try:
        return path.expanduser()
    except RuntimeError:  # no such user: a name that begins with ~
        return path
