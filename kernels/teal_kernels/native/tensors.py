"""Tensors as the native library reads them."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from teal_kernels.native.header import Dtype

DTYPES = {torch.float32: Dtype.F32, torch.bfloat16: Dtype.BF16, torch.float16: Dtype.F16}
"""Those of floats, as the header names them."""


def floats(table: Tensor, shape: Sequence[int]) -> Tensor:
    """Numbers as contiguous float32 on the CPU; the tensor itself where it is that."""
    if table.shape != torch.Size(shape):
        raise ValueError(f"{tuple(table.shape)} values do not fit, {tuple(shape)} are needed")
    return table.detach().to("cpu", torch.float32).contiguous()


def pointer(table: Tensor | None) -> int | None:
    """Where a tensor's numbers lie."""
    return None if table is None else table.data_ptr()


def address(structure: ctypes.Structure | None) -> int | None:
    """Where a structure lies."""
    return None if structure is None else ctypes.addressof(structure)
