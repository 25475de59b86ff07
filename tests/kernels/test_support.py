"""What the Triton kernels are refused on, and what runs there in their place."""

import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from teal_kernels import BackendUnavailableError, backend_unavailable_reason, resolve_backend, support

ROOT = Path(__file__).parents[2]


def _forget() -> None:
    support._wrong_gpu.cache_clear()
    support._wrong_triton.cache_clear()


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    _forget()
    yield
    _forget()


@pytest.fixture
def nvidia(monkeypatch: pytest.MonkeyPatch) -> None:
    """An NVIDIA GPU, as far as torch says."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def _refused(device: str, part: str) -> None:
    """In one line; `auto` takes the reference, and who asks for the kernels is told."""
    reason = str(backend_unavailable_reason("triton", device, torch.bfloat16))
    assert part in reason
    assert "\n" not in reason
    assert resolve_backend("auto", device, torch.bfloat16) == "reference"
    with pytest.raises(BackendUnavailableError, match="kernels"):
        resolve_backend("triton", device, torch.bfloat16)


@pytest.mark.usefixtures("nvidia")
def test_an_nvidia_gpu_is_taken() -> None:
    assert backend_unavailable_reason("triton", "cuda", torch.bfloat16) is None
    assert resolve_backend("auto", "cuda", torch.bfloat16) == "triton"


@pytest.mark.usefixtures("nvidia")
def test_amds_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch calls them cuda too."""
    monkeypatch.setattr(torch.version, "hip", "7.2.0")
    _refused("cuda", "PTX and need an NVIDIA GPU, not one of AMD's")


@pytest.mark.parametrize("device", ["xpu", "mps"])
def test_other_devices_are_refused(device: str) -> None:
    """Also in the interpreter, which takes CPU tensors."""
    _refused(device, f"need an NVIDIA GPU, not device {device}")


@pytest.mark.usefixtures("nvidia")
def test_old_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    _refused("cuda", "compute capability 7.0 or more, and this one has 6.1")


@pytest.mark.usefixtures("nvidia")
@pytest.mark.parametrize(
    ("installed", "taken"), [("3.5.1", False), ("3.6.0", True), ("3.9.1+git1", True), ("3.10.0", False)]
)
def test_versions_of_triton(installed: str, taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "installed_triton", lambda: installed)
    if taken:
        assert resolve_backend("auto", "cuda", torch.bfloat16) == "triton"
    else:
        _refused("cuda", f"triton {installed} is installed")


def test_the_range_is_that_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (requirement,) = [line for line in project["dependencies"] if line.startswith("triton")]
    first, beyond = (".".join(map(str, each)) for each in support.TRITON_RANGE)
    assert requirement.partition(";")[0] == f"triton>={first},<{beyond}"
