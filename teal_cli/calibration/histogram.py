"""Streaming histogram of |x|: exact integer counts in constant memory, mergeable in any order.

Bins are cut from the bits of the float32 value: the exponent and the first 8 bits of the mantissa.
That makes them logarithmic (each at most 1/256 wide, relative to its lower edge), aligned with the
values that bfloat16 can hold, and free of any rounding: a value belongs to exactly one bin on every
machine. Thresholds are the upper edges of bins, so that the share of inputs at or below a threshold
is read off the counts exactly. The idea is that of HDR histograms, on binary floats.
"""

import struct

import torch
from torch import Tensor

_MANTISSA_BITS = 8
_SHIFT = 23 - _MANTISSA_BITS
_MIN_EXPONENT = -40
"""|x| below 2**-40 shares bin 0 with zero."""
_MAX_EXPONENT = 24
"""|x| of 2**24 and above, infinity and NaN share the last bin."""

_FIRST_KEY = (_MIN_EXPONENT + 127) << _MANTISSA_BITS
BINS_PER_DOUBLING = 1 << _MANTISSA_BITS
"""Equally wide ones between a power of two and the next."""
_REGULAR_BINS = (_MAX_EXPONENT - _MIN_EXPONENT) << _MANTISSA_BITS
BINS = _REGULAR_BINS + 2
"""Bins of a histogram: the regular ones, one below, one above."""


def empty() -> Tensor:
    """A histogram of nothing: (BINS,) int64."""
    return torch.zeros(BINS, dtype=torch.int64)


def bin_of(x: Tensor) -> Tensor:
    """The bin of every element of x: int32, flat."""
    bits = x.detach().float().reshape(-1).contiguous().view(torch.int32)
    # Masking the sign bit is |x|, and keeps NaN in the last bin.
    key = (bits & 0x7FFFFFFF) >> _SHIFT
    return key.sub_(_FIRST_KEY - 1).clamp_(0, BINS - 1)


def count(x: Tensor) -> Tensor:
    """Histogram of |x| over all elements: (BINS,) int64 on the device of x."""
    return torch.bincount(bin_of(x), minlength=BINS)


def upper_edge(index: int) -> float:
    """The largest float32 value that falls into a bin."""
    key = index + _FIRST_KEY - 1
    (value,) = struct.unpack("<f", struct.pack("<I", ((key + 1) << _SHIFT) - 1))
    return float(value)


def threshold_for(counts: Tensor, sparsity: float) -> float:
    """The threshold t at which the share of |x| <= t is nearest to `sparsity`.

    Args:
        counts: (BINS,) int64, not empty.
        sparsity: in [0, 1); 0 gives 0.

    Raises:
        ValueError: an empty histogram, or so much in the last bin (2**24 and above, infinity, NaN)
            that the threshold would lie in it.
    """
    total = int(counts.sum())
    if total == 0:
        raise ValueError("the histogram is empty")
    if sparsity == 0.0:
        return 0.0
    below = counts.cumsum(0)
    wanted = sparsity * total
    index = int(torch.searchsorted(below, torch.tensor(wanted, dtype=torch.float64), right=False))
    # The bin that crosses the target, or the one before it, whichever ends nearer.
    if index > 0 and wanted - int(below[index - 1]) < int(below[index]) - wanted:
        index -= 1
    if index == BINS - 1:
        raise ValueError("hidden states of 2**24 and above, or not finite, at this sparsity")
    return upper_edge(index)


def sparsity_at(counts: Tensor, threshold: float) -> float:
    """The share of |x| <= threshold, where threshold is the edge of a bin.

    0 for an empty histogram.
    """
    total = int(counts.sum())
    if total == 0 or threshold < 0:
        return 0.0
    edge = int(bin_of(torch.tensor([threshold]))[0])
    return int(counts[: edge + 1].sum()) / total


def not_finite(counts: Tensor) -> int:
    """How many values were infinite, NaN or absurdly large (2**24 and above)."""
    return int(counts[-1])
