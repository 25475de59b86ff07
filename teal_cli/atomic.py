"""Files and folders that appear whole or not at all: temporary name, fsync, rename; and digests of what was written.

Every temporary `.NAME.XXXXXXXX.part` has a lock file `.NAME.XXXXXXXX.lock`, held as long as its process lives. Whoever
writes NAME next removes the temporaries whose lock nobody holds: those of killed processes, and no others.
"""

import ctypes
import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from teal_cli.errors import ArtefactError

_SEAL = "content_sha256"
"""Key of the digest that a JSON artefact has of all its other keys."""
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux's renameat2
_HERE = -100  # AT_FDCWD


def _sync_folder(folder: Path) -> None:
    """Make a rename inside the folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _permissions(most: int) -> int:
    """What the user's umask leaves: temporaries are private, what was asked for is a file like any other."""
    umask = os.umask(0)
    os.umask(umask)
    return most & ~umask


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A name beside `path` that is nobody else's; whatever is there at the end is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tidy(path)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".lock", dir=path.parent)
    os.close(descriptor)
    lock = Path(name)
    held = FileLock(lock)
    try:
        with suppress(NotImplementedError):  # a file system without locks: then nobody tidies up here either
            held.acquire()
        yield lock.with_suffix(".part")
    finally:
        _remove(lock.with_suffix(".part"))
        held.release()
        lock.unlink(missing_ok=True)


def tidy(path: Path) -> None:
    """Remove what killed processes left while they wrote `path`; an earlier folder that lost its name gets it back."""
    form = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}\.lock")
    with suppress(OSError, ValueError):  # no such folder, or a read-only one: then nothing can be done
        for lock in [entry for entry in path.parent.iterdir() if form.fullmatch(entry.name)]:
            with suppress(Timeout, NotImplementedError), FileLock(lock, timeout=0):
                earlier = lock.with_suffix(".old")
                if earlier.is_dir() and not path.exists():
                    earlier.rename(path)
                _remove(earlier)
                _remove(lock.with_suffix(".part"))
                lock.unlink(missing_ok=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; what was written there becomes `path` if the block succeeds."""
    with _temporary(path) as temporary:
        temporary.touch(0o600)
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(_permissions(0o666))
        temporary.replace(path)
        _sync_folder(path.parent)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place if the block succeeds.

    An earlier `folder` stays until the new one is whole. Of two processes that write at once, the later one's stays.
    """
    with _temporary(folder) as temporary:
        temporary.mkdir(0o700)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file() and not file.is_symlink():
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
        _sync_folder(temporary)
        temporary.chmod(_permissions(0o777))
        _take_place(temporary, folder)
        _sync_folder(folder.parent)


def _take_place(new: Path, folder: Path) -> None:
    """Give a folder its name; an earlier one of that name goes where the new one was, or away."""
    while True:
        try:
            new.rename(folder)  # where there is none, or an empty one
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        try:
            if _exchange(new, folder):
                return
            # Without an exchange there is a moment without either: `tidy` gives the earlier one its name back.
            earlier = new.with_suffix(".old")
            folder.rename(earlier)
        except FileNotFoundError:  # another process had just moved it
            continue
        try:
            new.rename(folder)
        except BaseException as error:  # Ctrl-C too: the earlier folder comes back
            with suppress(OSError):
                earlier.rename(folder)
            if not (isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST)):
                raise
        else:
            _remove(earlier)
            return
        _remove(earlier)


def _exchange(first: Path, second: Path) -> bool:
    """Two names swapped in one step; False where the system or the file system cannot."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    if call(_HERE, os.fsencode(first), _HERE, os.fsencode(second), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(second))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON atomically, indented, with a final newline. NaN and infinity, which JSON lacks, become null."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(_finite(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value


def sealed(content: Mapping[str, Any], *, only: Collection[str] | None = None) -> dict[str, Any]:
    """A JSON mapping with the digest of its content, or of some of its keys."""
    return {**content, _SEAL: _digest(content, only)}


def check_seal(
    content: Mapping[str, Any], what: str, path: Path, advice: str, *, only: Collection[str] | None = None
) -> None:
    """Refuse a JSON mapping that is not what was written. Those of older versions have no digest.

    Raises:
        ArtefactError: another digest.
    """
    if _SEAL in content and content[_SEAL] != _digest(content, only):
        raise ArtefactError(f"{what} {path} was altered: {advice}")


def _digest(content: Mapping[str, Any], only: Collection[str] | None) -> str:
    """sha256, in hex, of the keys (all but the digest's own unless said) and their values, as JSON with sorted keys."""
    keys = [key for key in content if key != _SEAL and (only is None or key in only)]
    try:
        text = json.dumps({key: content[key] for key in keys}, sort_keys=True)
    except RecursionError:
        return "nested too deep"
    return hashlib.sha256(text.encode()).hexdigest()


def update_with_samples(
    digest: "hashlib._Hash", stream: BinaryIO, begin: int, length: int, *, count: int, size: int
) -> None:
    """Feed `count` samples of `size` bytes, spread evenly over [begin, begin + length), ends included, to a digest."""
    for sample in range(count):
        stream.seek(begin + max(0, length - size) * sample // (count - 1))
        digest.update(stream.read(min(size, length)))


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, in hex.

    Raises:
        ArtefactError: a pipe, a device or a folder, of which nobody knows where it ends.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ArtefactError(f"{path} is not an ordinary file")
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
