"""The kernel of `teal_kernels.triton_masks`, where it is explained. Triton's language, so not type-checked."""

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
    gradient_ptr,
    result_ptr,
    threshold_ptr,
    starts_ptr,
    dropped_ptr,
    numel,
    start,
    features,
    tokens,
    offset,
    BACKWARD: tl.constexpr,
    STARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """x in the result's dtype, without dropped inputs; their number is added to `dropped`. Masked again, it stays so.

    Backward x is that result: what is 0 in it was dropped, and the gradient of all else is let through.
    """
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = number < numel
    x = tl.load(x_ptr + number, mask=inside, other=0.0)
    limit = tl.load(threshold_ptr)
    if BACKWARD:
        limit = tl.minimum(limit, 0.0)  # below 0 it drops nothing
        kept = tl.load(gradient_ptr + number, mask=inside, other=0.0)
    else:
        x = x.to(result_ptr.dtype.element_ty)
        kept = x
    dropped = tl.abs(x.to(tl.float32)) <= limit  # not of a NaN
    dropped = dropped & (_stays(number, starts_ptr, start, features, tokens, offset, inside, STARTS) == 0) & inside
    tl.store(result_ptr + number, tl.where(dropped, 0.0, kept).to(result_ptr.dtype.element_ty), mask=inside)
    if not BACKWARD:
        tl.atomic_add(dropped_ptr, tl.sum(dropped.to(tl.int32)).to(tl.int64), sem="relaxed")
