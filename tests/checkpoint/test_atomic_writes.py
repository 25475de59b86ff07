"""Files and folders are whole or not there, whenever a process is killed and whoever else writes."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Barrier, Thread

import pytest

from teal_cli import atomic
from teal_cli.atomic import atomic_folder, atomic_path, check_seal, file_digest, sealed, tidy
from teal_cli.errors import ArtefactError

_FILES = ("config.json", "teal.json")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


def _names(place: Path) -> list[str]:
    return sorted(entry.name for entry in place.iterdir())


def _write(folder: Path, text: str) -> None:
    with atomic_folder(folder) as temporary:
        for name in _FILES:
            (temporary / name).write_text(text)


def _killed_at(step: int, work: Callable[[], None]) -> bool:
    """Run in another process that is killed before its n-th file operation; whether it came so far."""
    child = os.fork()
    if child == 0:
        seen = 0

        def count(event: str, arguments: object) -> None:
            nonlocal seen
            if event.partition(".")[0] in ("open", "os", "shutil", "tempfile", "fcntl", "ctypes"):
                seen += 1
                if seen > step:
                    os._exit(9)

        sys.addaudithook(count)
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("exchange", [True, False])
def test_killed_at_any_operation(exchange: bool, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next command finds the earlier folder or the new one, and the next export takes away what was left."""
    if not exchange:  # as on a file system that cannot
        monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    folder = place / "fisher-0.50"
    found, step = set(), 0
    while True:
        _write(folder, "old")
        assert _names(place) == ["fisher-0.50"]
        if not _killed_at(step, lambda: _write(folder, "new")):
            break
        if not exchange:
            tidy(folder)
        (text,) = {(folder / name).read_text() for name in _FILES}
        found.add(text)
        step += 1
    assert step > 15
    assert found == {"old", "new"}
    _write(folder, "old")
    assert _names(place) == ["fisher-0.50"]


def test_a_killed_write_of_a_file_leaves_the_earlier_one(place: Path) -> None:
    path, step = place / "calibration.safetensors", 0

    def write(text: str) -> None:
        with atomic_path(path) as temporary:
            temporary.write_text(text)

    write("old")
    while _killed_at(step, lambda: write("new")):
        assert path.read_text() in ("old", "new")
        step += 1
    write("old")
    assert _names(place) == [path.name]


def test_what_others_are_writing_stays(place: Path) -> None:
    folder = place / "out"
    with atomic_folder(folder) as theirs:
        (theirs / "config.json").write_text("theirs")
        _write(folder, "ours")
        assert (theirs / "config.json").read_text() == "theirs"
        _write(place / "out.more", "another")
        assert theirs.is_dir()
    assert (folder / "config.json").read_text() == "theirs"
    assert _names(place) == ["out", "out.more"]


@pytest.mark.parametrize("exchange", [True, False])
def test_many_write_one_folder(exchange: bool, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    folder, together, failed = place / "out", Barrier(4), []

    def write(text: str) -> None:
        together.wait()
        try:
            for _ in range(5):
                _write(folder, text)
        except OSError as error:
            failed.append(error)

    threads = [Thread(target=write, args=(str(number),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len({(folder / name).read_text() for name in _FILES}) == 1
    assert _names(place) == ["out"]


def test_a_failed_write_leaves_nothing(place: Path) -> None:
    def write_half() -> None:
        with atomic_folder(place / "out") as temporary:
            (temporary / "config.json").write_text("new")
            raise KeyError

    _write(place / "out", "old")
    with pytest.raises(KeyError):
        write_half()
    assert _names(place) == ["out"]
    assert (place / "out" / "config.json").read_text() == "old"


def test_seal() -> None:
    content = sealed({"tokens": 256, "seconds": 0.1})
    check_seal(content, "calibration", Path("c.json"), "again")
    check_seal({"tokens": 256}, "calibration", Path("c.json"), "again")  # of an older version
    for change in ({"tokens": 257}, {"more": 1}, {"content_sha256": None}):
        with pytest.raises(ArtefactError, match="was altered"):
            check_seal(content | change, "calibration", Path("c.json"), "again")


def test_endless_files_are_not_hashed(place: Path) -> None:
    os.mkfifo(place / "pipe")
    for path in (place / "pipe", Path("/dev/zero")):
        with pytest.raises(ArtefactError, match="not an ordinary file"):
            file_digest(path)
