"""How likely counts are for a distribution (Pearson's chi-square)."""

import torch
from torch import Tensor


def chi_square_p(found: Tensor, shares: Tensor) -> float:
    """Probability of counts at least so far from a distribution.

    Args:
        found: (cells,) counts.
        shares: (cells,) of the distribution, up to a factor.
    """
    counts, expected = found.double(), shares.double() / shares.double().sum() * found.sum()
    possible = expected > 0
    assert bool((counts[~possible] == 0).all())
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    freedom = torch.tensor(float(possible.sum() - 1), dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))
