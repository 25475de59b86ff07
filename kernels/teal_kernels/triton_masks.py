"""Hidden states without the inputs that are dropped, for training under masks.

One launch rounds, compares, leaves out and counts; PyTorch takes six, each of which reads and writes the whole hidden
state. What the backward pass needs is what the product holds anyway: the result itself.

Importable without triton.
"""

from typing import Any

import torch
from torch import Tensor

from teal_kernels.launching import TRITON_MISSING, launch
from teal_kernels.support import kernels_unsupported_reason

if TRITON_MISSING is None:
    from teal_kernels.jit_masks import mask_kernel

_BLOCK, _WARPS = 4096, 8


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        threshold: Tensor,
        start: Tensor | int,
        tokens: int,
        offset: int,
        dtype: torch.dtype,
        straight_through: bool,
    ) -> tuple[Tensor, Tensor]:
        given = x.contiguous()
        y = torch.empty_like(given, dtype=dtype)
        dropped = torch.zeros((), dtype=torch.int64, device=x.device)
        starts, first = (start, 0) if isinstance(start, Tensor) else (threshold, start)
        sizes = given.numel(), first, x.shape[-1], tokens, offset
        how = {"STARTS": isinstance(start, Tensor), "BLOCK": _BLOCK}
        ctx.place = sizes, how, straight_through, x.dtype
        ctx.save_for_backward(*(() if straight_through else (y, threshold, starts)))
        ctx.mark_non_differentiable(dropped)
        _launch(given, given, y, threshold, starts, dropped, *sizes, BACKWARD=False, **how)
        return y, dropped

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        sizes, how, straight_through, dtype = ctx.place
        gradient = gradients[0]
        if straight_through:
            return gradient.to(dtype), *[None] * 6
        y, threshold, starts = ctx.saved_tensors
        result = torch.empty_like(y, dtype=dtype)
        _launch(y, gradient.contiguous(), result, threshold, starts, y, *sizes, BACKWARD=True, **how)  # counts nothing
        return result, *[None] * 6


def _launch(x: Tensor, *arguments: Any, **constants: Any) -> None:
    with torch.cuda.device_of(x):  # of a model on several GPUs: triton launches on the current one
        launch(mask_kernel, (-(-x.numel() // _BLOCK),), x, *arguments, warps=_WARPS, pdl=False, **constants)


def is_worth_it(x: Tensor) -> bool:
    """Whether `masked_rows` takes x and spares time: on a GPU, in training, whose passes are replayed as graphs.

    Launched one by one it spares none: forward and backward took the host 446 us, and PyTorch's own 389 (an H200).
    """
    return x.is_cuda and torch.is_grad_enabled() and kernels_unsupported_reason(x.device, x.dtype) is None


def masked_rows(
    x: Tensor,
    threshold: Tensor,
    start: Tensor | int,
    *,
    tokens: int,
    offset: int = 0,
    dtype: torch.dtype | None = None,
    straight_through: bool = False,
) -> tuple[Tensor, Tensor]:
    """x without the inputs that are dropped, and how many these are. x gets a gradient where inputs are kept.

    Args:
        x: (batch, tokens, in) or (batch * tokens, in), float32, float16 or bfloat16.
        threshold: 0-d float32; an input is dropped whose size, in the dtype of the result, is at most that. Must not
            change before the backward pass.
        start: of each row the first position that may drop inputs, (batch,) int64; or of all.
        tokens: of each row.
        offset: positions of a row that come before those of x.
        dtype: of the result; by default that of x.
        straight_through: let the gradient through as if nothing were dropped.

    Returns:
        The shape of x; and 0-d int64, on its device.
    """
    found: tuple[Tensor, Tensor] = _Masked.apply(
        x, threshold, start, tokens, offset, x.dtype if dtype is None else dtype, straight_through
    )
    return found
