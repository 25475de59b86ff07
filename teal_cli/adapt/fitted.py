"""Routers by least squares: what a linear layer can tell of the neurons from what the MLP reads.

On SmolLM2-135M half of the groups that such a router chooses have all but as much of the neurons' energy as the half
that an oracle chooses; a router that knows nothing chooses half of the energy.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

_RIDGE = 1e-2
"""Of the mean variance of an input, which is added to all of them."""
_SPREAD = 2.0
"""Standard deviation of logits: where a sigmoid still has a slope for most of them."""


class Fitted(NamedTuple):
    """A router of one linear layer."""

    weight: Tensor
    """(groups, inputs) float32."""
    bias: Tensor
    """(groups,) float32."""


def group_sizes(hidden: Tensor, down: nn.Linear, order: Tensor, group: int) -> Tensor:
    """How much each group of neurons adds to the residual stream: (..., neurons) -> (tokens, groups) float32.

    Args:
        hidden: what `down` reads, its neurons in their own order.
        down: neurons count by the norms of its columns.
        order: (neurons,) int64: group after group.
        group: neurons of each.
    """
    added = hidden.flatten(0, -2).float() * down.weight.float().norm(dim=0)
    sizes: Tensor = added[:, order].view(len(added), -1, group).norm(dim=-1)
    return sizes


def fitted_router(x: Tensor, sizes: Tensor, share: float) -> Fitted:
    """Ridge regression of sizes on inputs; over all tokens and groups a share of logits is below zero.

    Args:
        x: (tokens, inputs).
        sizes: (tokens, groups), of `group_sizes`.
        share: of groups to leave out, in (0, 1).
    """
    x, sizes = x.float(), sizes.float()
    mean, its_mean = x.mean(0), sizes.mean(0)
    centred = x - mean
    covariance = centred.T @ centred / len(x)
    ridge = _RIDGE * covariance.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    covariance.diagonal().add_(ridge)
    weight = torch.linalg.solve(covariance, centred.T @ (sizes - its_mean) / len(x)).T
    logits = centred @ weight.T + its_mean
    scale = _SPREAD / logits.std().clamp_min(torch.finfo(torch.float32).tiny)
    left_out = min(max(round(share * logits.numel()), 1), logits.numel() - 1)
    border = logits.flatten().kthvalue(left_out).values
    return Fitted(weight * scale, (its_mean - weight @ mean - border) * scale)
