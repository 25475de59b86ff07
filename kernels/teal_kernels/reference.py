"""The definition of the sparse product, in plain torch: every other backend is held against it.

An input is dropped when |x| <= threshold (TEAL, arXiv 2408.14690, equation 1). The comparison is
made in float32 whatever the dtype of x, so that a threshold means the same to every backend. NaN
is never <= anything: it stays, and propagates as in the dense product.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

KEEP_ALL = float("-inf")
"""The threshold of a projection that drops nothing: no |x| is below it, and so none is a special case of a kernel."""


def active_inputs(x: Tensor, threshold: Tensor) -> Tensor:
    """Which inputs are kept.

    Args:
        x: hidden states, any shape, any floating dtype.
        threshold: 0-d float32 (float64 for a float64 x) on the device of x.

    Returns:
        bool tensor of x's shape, True where the input is read.
    """
    magnitude = x.abs()
    if x.dtype in (torch.float16, torch.bfloat16):
        magnitude = magnitude.float()
    return (magnitude <= threshold).logical_not_()


def masked_input(x: Tensor, threshold: Tensor) -> Tensor:
    """x with the dropped inputs set to zero; same shape and dtype."""
    return torch.where(active_inputs(x, threshold), x, torch.zeros((), dtype=x.dtype, device=x.device))


def reference_linear(x: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor) -> Tensor:
    """Masked input times the whole weight: the meaning of `sparse_linear`, at dense cost.

    Args:
        x: (..., in) hidden states.
        weight: (out, in), the dtype of x.
        bias: (out,) or None.
        threshold: 0-d tensor.

    Returns:
        (..., out), the dtype of x.
    """
    return F.linear(masked_input(x, threshold), weight, bias)
