"""The kernels of `teal_kernels.triton_masks`, where they are explained. Triton's language, so not type-checked."""

import triton
import triton.language as tl


@triton.jit
def _stays(number, starts_ptr, start, features, tokens, offset, inside, STARTS: tl.constexpr):
    """Which numbers of (batch, tokens, features) lie before the position at which their row may drop inputs."""
    row = number // features
    if STARTS:
        start = tl.load(starts_ptr + row // tokens, mask=inside, other=0)
    return row % tokens + offset < start


@triton.jit
def mask_kernel(
    x_ptr,
    y_ptr,
    threshold_ptr,
    starts_ptr,
    dropped_ptr,
    numel,
    start,
    features,
    tokens,
    offset,
    STARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """y = x in y's dtype, without dropped inputs; their number is added to `dropped`. Masked again, y stays so."""
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = number < numel
    x = tl.load(x_ptr + number, mask=inside, other=0.0).to(y_ptr.dtype.element_ty)
    dropped = tl.abs(x.to(tl.float32)) <= tl.load(threshold_ptr)  # not of a NaN
    dropped = dropped & (_stays(number, starts_ptr, start, features, tokens, offset, inside, STARTS) == 0) & inside
    tl.store(y_ptr + number, tl.where(dropped, 0.0, x).to(y_ptr.dtype.element_ty), mask=inside)
    tl.atomic_add(dropped_ptr, tl.sum(dropped.to(tl.int32)).to(tl.int64), sem="relaxed")


@triton.jit
def mask_backward_kernel(
    gradient_ptr,
    y_ptr,
    result_ptr,
    threshold_ptr,
    starts_ptr,
    numel,
    start,
    features,
    tokens,
    offset,
    STARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """The gradient of what was kept, in the result's dtype: a dropped input left a zero, and no kept one is zero."""
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = number < numel
    y = tl.load(y_ptr + number, mask=inside, other=0.0)
    dropped = tl.abs(y.to(tl.float32)) <= tl.minimum(tl.load(threshold_ptr), 0.0)  # below 0 it drops nothing
    dropped = dropped & (_stays(number, starts_ptr, start, features, tokens, offset, inside, STARTS) == 0)
    gradient = tl.load(gradient_ptr + number, mask=inside, other=0.0)
    tl.store(result_ptr + number, tl.where(dropped, 0.0, gradient).to(result_ptr.dtype.element_ty), mask=inside)
