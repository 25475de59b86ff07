"""Counts of signed values in somebody else's bins, told again in our bins of |x|. Pure maths.

Inside a bin nobody knows where its values lie: they are taken to be spread evenly. What that loses is
at most the width of the bin, so thresholds are as coarse as the bins were, and a bin that holds a
large share of all values (padding that was counted) hides every threshold inside it.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teal_cli.calibration import histogram

_EVEN = 0.01
"""How much the width of a bin may differ from the others: centres are float32 (0.1 % in the published files)."""

_MOST_BINS = 1 << 20
_MOST_COUNTED = 2.0**53
"""Beyond, float64 does not tell whole numbers apart."""


@cache
def _upper_edges() -> NDArray[np.float64]:
    """Of our bins but the last, which has none."""
    return np.array([histogram.upper_edge(index) for index in range(histogram.BINS - 1)])


@dataclass(frozen=True)
class SignedHistogram:
    """Counts between edges that rise through zero."""

    edges: NDArray[np.float64]
    """(bins + 1,)"""
    counts: NDArray[np.float64]
    """(bins,), whole numbers."""

    @classmethod
    def from_centers(cls, centers: Tensor, counts: Tensor) -> "SignedHistogram":
        """Of bins between two quantiles, all as wide, and one outlier bin at either end, as wide as it needs to be.

        Args:
            centers: (bins,), the middle of each bin.
            counts: (bins,), how many values each holds.

        Raises:
            ValueError: shapes, values or widths that such a histogram cannot have.
        """
        if centers.dim() != 1 or centers.shape != counts.shape or not 5 <= len(centers) <= _MOST_BINS:
            raise ValueError(f"centres of shape {tuple(centers.shape)} and counts of {tuple(counts.shape)}")
        if any(
            tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex() for tensor in (centers, counts)
        ):
            raise ValueError("its numbers are not plain ones")
        middle, held = centers.double().numpy(), counts.double().numpy()
        if not (
            np.isfinite(middle).all()
            and np.isfinite(held).all()
            and (held >= 0).all()
            and 0 < held.sum() < _MOST_COUNTED
        ):
            raise ValueError("its numbers are not those of a histogram")
        width = (middle[-2] - middle[1]) / (len(middle) - 3)
        if not 0 < width < np.inf or np.abs(np.diff(middle[1:-1]) / width - 1.0).max() > _EVEN:
            raise ValueError("its bins between the outliers are not equally wide")
        inner = middle[1] - width / 2 + width * np.arange(len(middle) - 1)
        least, most = 2 * middle[0] - inner[0], 2 * middle[-1] - inner[-1]
        if not -np.inf < least <= inner[0] < inner[-1] <= most < np.inf:
            raise ValueError("its outliers lie between the other values")
        return cls(np.concatenate([[least], inner, [most]]), held)

    @property
    def total(self) -> float:
        """Values counted."""
        return float(self.counts.sum())

    def fullest(self) -> tuple[float, float]:
        """The greatest share of values in one bin that is not an outlier's, and the middle of that bin."""
        index = int(self.counts[1:-1].argmax()) + 1
        return float(self.counts[index]) / self.total, float(self.edges[index : index + 2].mean())

    def of_magnitudes(self) -> Tensor:
        """As `calibration.histogram` counts |x|: (histogram.BINS,) int64, with the same total."""
        cumulative = np.concatenate([[0.0], np.cumsum(self.counts)])
        tops = _upper_edges()
        # |x| <= t is -t <= x <= t, whatever the two sides of zero look like.
        below = np.interp(tops, self.edges, cumulative) - np.interp(-tops, self.edges, cumulative)
        rounded = np.rint(np.concatenate([[0.0], below, [self.total]]))
        return torch.from_numpy(np.diff(rounded).astype(np.int64))
