"""What made a result: the machine and the library versions, for every artefact and JSON."""

import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from teal_cli.version import __version__

_PACKAGES = ("torch", "transformers", "triton", "datasets", "safetensors")


def library_versions() -> dict[str, str]:
    """Installed versions of what results depend on."""
    found = {"teal": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def now() -> str:
    """The time, as results and artefacts carry it: UTC, to the second, such as 2026-01-31T12:00:00+00:00."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _cpu_name() -> str:
    """The processor's marketing name where Linux tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def device_description(device: Any) -> str:
    """The device of a result, in words.

    Args:
        device: a torch.device.
    """
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {torch.get_num_threads()} threads"
