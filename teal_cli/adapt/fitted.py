"""Routers by least squares: what a linear layer can tell of the neurons from what the MLP reads.

On SmolLM2-135M half of the groups that such a router chooses have all but as much of the neurons' energy as the half
that an oracle chooses; a router that knows nothing chooses half of the energy.

Weights that train move away from what routers were fitted to, so routers are fitted again and again.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from teal_cli.adapt.followed import FollowedRouters
from teal_cli.sparse.routed import RoutedMLP, Router

_RIDGE = 1e-2
"""Of the mean variance of an input, which is added to all of them."""
_SPREAD = 2.0
"""Standard deviation of logits. Any would choose alike; of one size they can be averaged."""
_EVERY = 16
"""Passes from one fit to the next."""
_TOKENS = 4096
"""Of a pass, that a fit takes at most."""
_ENOUGH = 7
"""Tokens of a fit for each input, by which it is good. A router goes less far to what a fit of fewer finds: on
SmolLM2-135M, of 576 inputs, fits of 256 tokens chose 67 % of the energy where one of 16,384 chose 79, and at the whole
rate they took it down to 75."""
_RATE = 0.25
"""By how much of the way a router goes to what a good fit finds: so it is one of seven of them."""
_RATE_OF_BIASES = 0.5
"""The same of biases, where every pass is a look: at the rate of routers that stand still SmolLM2-135M opens groups
faster than biases close them."""


class Fitted(NamedTuple):
    """A router of one linear layer."""

    weight: Tensor
    """(groups, inputs) float32."""
    bias: Tensor
    """(groups,) float32."""


def group_sizes(hidden: Tensor, down: nn.Linear, group: int, order: Tensor | None = None) -> Tensor:
    """How much each group of neurons adds to the residual stream: (..., neurons) -> (tokens, groups) float32.

    Args:
        hidden: what `down` reads, its neurons in their own order.
        down: neurons count by the norms of its columns.
        group: neurons of each.
        order: (neurons,) int64: group after group; None where they lie so.
    """
    added = hidden.flatten(0, -2).float() * down.weight.float().norm(dim=0)
    if order is not None:
        added = added[:, order]
    sizes: Tensor = added.view(len(added), -1, group).norm(dim=-1)
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


def fit_bytes(tokens: int, mlp: tuple[int, int, int], itemsize: int) -> int:
    """Bytes that the fit of one router holds for a moment.

    Args:
        tokens: of the fit.
        mlp: its inputs, its neurons and the groups of these.
        itemsize: bytes of a hidden state's number.
    """
    inputs, neurons, groups = mlp
    # First gate, up, the activated gate and their product; or this, and twice in float32 what it adds.
    of_neurons = tokens * ((4 + itemsize) * inputs + max(4 * itemsize, itemsize + 2 * 4) * neurons)
    # Then, in float32, inputs as they are and centred, sizes and logits with copies, covariances, and weights.
    numbers = 2 * tokens * inputs + 5 * tokens * groups + 3 * inputs**2 + 4 * groups * (inputs + 1)
    return max(of_neurons, 4 * numbers)


def tokens_of_fit(tokens: int) -> int:
    """How many tokens of a pass over so many a fit in training takes: of the second halves of its sequences."""
    late = tokens // 2
    return -(-late // max(1, late // _TOKENS))


class RefittedRouters(FollowedRouters):
    """Routers of one linear layer that are fitted again in training, a part of the way each time.

    Every pass moves biases, as of other routers; every sixteenth the weights as well. A linear layer is all that is
    fitted, by what the MLP reads there and the neurons that it has then, which are all computed in training.

    Args:
        mlps: whose routers nothing else moves.
        target: share of groups that each is to leave out.
    """

    def __init__(self, mlps: Sequence[RoutedMLP], target: float) -> None:
        super().__init__([mlp.router for mlp in mlps], target, even=True)
        self._mlps = list(mlps)

    @property
    def every(self) -> int:
        """See `Followed`."""
        return 1

    @property
    def rate(self) -> float:
        """See `FollowedRouters`."""
        return _RATE_OF_BIASES

    @property
    def _fits(self) -> bool:
        return self._shares is not None and self._passes % _EVERY == 0

    @property
    def kind(self) -> Hashable:
        """See `Followed`: a fit solves equations, which no graph can hold, so no two of them are of one kind."""
        return (super().kind, self._passes if self._fits else None)

    @property
    def tokens(self) -> int:
        """See `Followed`."""
        return _TOKENS if self._fits else super().tokens

    def quantile(self, index: int, sample: Tensor) -> Tensor:
        """See `FollowedRouters`; of a fit weights and biases, (groups, inputs + 1) float32. Of a fit of few
        tokens they are nearer to what the router has."""
        if not self._fits:
            return super().quantile(index, sample)
        mlp = self._mlps[index]
        gate, up, down = mlp.layers
        x = sample.to(gate.weight.dtype)
        sizes = group_sizes(mlp.hidden(gate(x), up(x)), down, mlp.group)
        with torch.autocast(x.device.type, enabled=False):
            fitted = fitted_router(sample, sizes, self._target)
        wanted = torch.cat([fitted.weight, fitted.bias[:, None]], dim=1)
        held = torch.cat([mlp.router.weight, mlp.router.bias[:, None]], dim=1).float()
        return held.lerp(wanted, min(1.0, len(sample) / (_ENOUGH * sample.shape[1])))

    def move(self, indices: list[int], wanted: Tensor) -> None:
        """See `Followed`."""
        if wanted.dim() == 1:
            super().move(indices, wanted)
            return
        for index, both in zip(indices, wanted, strict=True):
            router = cast(Router, self.modules[index])
            both = both.to(router.weight)
            router.weight.data.lerp_(both[:, :-1], _RATE)
            router.bias.data.lerp_(both[:, -1], _RATE)

    def values(self) -> Tensor:
        """See `FollowedRouters`; and of each router its weights."""
        weights = [cast(Router, router).weight.detach().float().flatten().cpu() for router in self.modules]
        return torch.cat([super().values(), torch.stack(weights)], dim=1)

    def put(self, values: Tensor) -> None:
        """See `Followed`."""
        ends = 1 + cast(Router, self.modules[0]).bias.numel()
        super().put(values[:, :ends])
        for router, weight in zip(self.modules, values[:, ends:], strict=True):
            held = cast(Router, router).weight.data
            held.copy_(weight.view_as(held))
