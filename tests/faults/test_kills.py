"""A process that is killed at any file operation leaves the earlier artefact or the new one, whole."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import save_tiny, write_corpus

from teal_cli.cli import run

_OPERATIONS = ("fsync", "replace", "rename", "link", "symlink", "unlink", "rmdir", "mkdir", "open")


class _Killer:
    """Counts file operations, and ends the process at one of them."""

    def __init__(self, at: int | None) -> None:
        self.at, self.count = at, 0

    def install(self) -> None:
        for name in _OPERATIONS:
            setattr(os, name, self._counted(getattr(os, name)))

    def _counted(self, operation: Callable[..., object]) -> Callable[..., object]:
        def counted(*args: object, **options: object) -> object:
            if self.count == self.at:
                os._exit(137)
            self.count += 1
            return operation(*args, **options)

        return counted


def _run_killed(arguments: list[str], at: int | None) -> tuple[int, int]:
    """Exit code (137 where it was killed) and operations of a command in a forked process."""
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)  # the threads of the parent are not here
            killer = _Killer(at)
            killer.install()
            code = run(arguments)
            os.write(sending, str(killer.count).encode())
        finally:
            os._exit(code)
    os.close(sending)
    with os.fdopen(receiving) as stream:
        counted = stream.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), int(counted or 0)


def _leftovers(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob(".*") if path.suffix in (".part", ".old")]


@pytest.fixture
def exported(tmp_path: Path) -> list[str]:
    """The command line that exports another checkpoint over the one in `out`."""
    torch.set_num_threads(1)
    model, corpus = save_tiny(tmp_path / "tiny"), write_corpus(tmp_path / "corpus.txt")
    calibrate = ["calibrate", "--model", str(model), "--dataset", str(corpus), "--tokens", "256", "--seq-len", "64"]
    assert run([*calibrate, "--sensitivity-tokens", "0", "--quiet"]) == 0
    flags = ["--model", str(model), "--allocation", "uniform", "--no-recalibrate", "--out", "out", "--quiet"]
    assert run(["export", *flags, "--sparsity", "0.3"]) == 0
    return ["export", *flags, "--sparsity", "0.6"]


def test_an_export_over_another(exported: list[str], tmp_path: Path) -> None:
    work, before = Path.cwd(), tmp_path / "before"
    shutil.copytree(work, before)
    code, operations = _run_killed(exported, None)
    assert code == 0
    assert operations > 10
    seen = set()
    for number in range(operations):
        shutil.rmtree(work / "out", ignore_errors=True)
        for left in _leftovers(work):
            shutil.rmtree(left, ignore_errors=True)
        shutil.copytree(before / "out", work / "out")
        assert _run_killed(exported, number)[0] == 137
        assert run(["inspect", "out", "--quiet", "--json", "found.json"]) == 0, number
        seen.add(json.loads(Path("found.json").read_text())["exports"][0]["target_sparsity"])
        if number % 7 == 0 or number > operations - 12:
            assert run(exported) == 0, number
            assert not _leftovers(work), number
            assert json.loads(Path("out/teal.json").read_text())["target_sparsity"] == 0.6
    assert seen == {0.3, 0.6}


def test_a_result_over_another(exported: list[str]) -> None:
    command = ["inspect", "out", "--quiet", "--json", "result.json"]
    assert run(command) == 0
    whole = json.loads(Path("result.json").read_text())
    code, operations = _run_killed(command, None)
    assert code == 0
    for number in range(operations):
        assert _run_killed(command, number)[0] == 137
        found = json.loads(Path("result.json").read_text())
        assert found.keys() == whole.keys()
