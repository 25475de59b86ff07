"""What a machine must have for the Triton kernels: an NVIDIA GPU, not too old, and a triton of the tested range."""

from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

import torch

from teal_kernels.launching import TRITON_MISSING, interpreting

TRITON_RANGE = ((3, 6), (3, 10))
"""The first version allowed, and the first that is not, as in pyproject.toml: README.md says what depends on it."""
OLDEST_GPU = (7, 0)
"""Compute capability: loads that say what the L2 cache may evict first are no instruction of older ones."""
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def kernels_unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot run on tensors of this device and dtype, in one line; None where they can.

    Nothing is compiled to find out.
    """
    if TRITON_MISSING is not None:
        return TRITON_MISSING
    reason = _wrong_triton()
    if reason is None and not (device.type == "cpu" and interpreting()):
        reason = _wrong_gpu(device)
    if reason is None and dtype not in _DTYPES:
        reason = f"the triton backend takes float16, bfloat16 and float32, not {dtype}"
    return reason


def installed_triton() -> str:
    """Its version."""
    try:
        return version("triton")
    except PackageNotFoundError:  # builds of it have other names, such as pytorch-triton
        import triton

        return str(triton.__version__)


# Remembered: eager products on a GPU ask at every call.
@lru_cache(maxsize=1)
def _wrong_triton() -> str | None:
    installed = installed_triton()
    first, beyond = TRITON_RANGE
    if first <= tuple(map(int, installed.split(".")[:2])) < beyond:
        return None
    allowed = f">={'.'.join(map(str, first))},<{'.'.join(map(str, beyond))}"
    return f"triton {installed} is installed, and the kernels need another version: pip install 'triton{allowed}'"


@lru_cache(maxsize=16)
def _wrong_gpu(device: torch.device) -> str | None:
    if device.type == "cpu":
        return "the triton backend needs a GPU (or TRITON_INTERPRET=1 to run its interpreter)"
    if device.type != "cuda" or torch.version.hip:
        found = "one of AMD's (ROCm)" if device.type == "cuda" else f"device {device.type}"
        return f"the kernels contain PTX and need an NVIDIA GPU, not {found}; the reference backend runs there"
    if torch.cuda.is_available() and (capability := torch.cuda.get_device_capability(device)) < OLDEST_GPU:
        needed, has = (".".join(map(str, each)) for each in (OLDEST_GPU, capability))
        return f"the kernels need an NVIDIA GPU of compute capability {needed} or more, and this one has {has}"
    return None
