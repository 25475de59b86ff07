"""Places to write to are tried before the work, and nothing stays of the trial."""

import os
from pathlib import Path

import pytest

from teal_cli.errors import UsageError
from teal_cli.writing import check_file, check_folder, require


@pytest.fixture
def fifo() -> Path:
    os.mkfifo("fifo")
    return Path("fifo")


@pytest.mark.parametrize("path", ["r.json", "new/deeper/r.json", "link"])
def test_a_place_that_can_be_written(path: str) -> None:
    Path("old.json").write_text("{}")
    Path("link").symlink_to("old.json")
    before = sorted(Path().iterdir())
    check_file(Path(path))
    check_folder(Path(path) if path != "link" else Path("folder"))
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (".", "folder"),
        ("/dev/full", "no ordinary file"),
        ("fifo", "no ordinary file"),
        ("fifo/r.json", "cannot be written"),
        ("/proc/r.json", "cannot be written in /proc"),
        ("x" * 250, "cannot be written"),
        ("n/" + "x" * 300 + "/r.json", "cannot be written"),
        ("a\0b", "null"),
    ],
)
def test_a_place_that_cannot(fifo: Path, path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_file(Path(path))
    with pytest.raises(UsageError, match=message):
        require(check_file, Path(path))


@pytest.mark.parametrize("path", ["fifo", "fifo/below", "/proc", "/proc/new/er", "x" * 300])
def test_a_folder_that_cannot_be_made(fifo: Path, path: str) -> None:
    with pytest.raises(ValueError, match="cannot be written"):
        check_folder(Path(path))
