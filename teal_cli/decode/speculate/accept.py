"""Which of the drafted tokens are accepted, and which one comes behind them.

Greedy: as long as the drafted token is the one that the model would have written. Sampling: by rejection (Leviathan and
others, arXiv 2211.17192; Chen and others, arXiv 2302.01318), so that tokens are distributed as the model's own.
"""

import torch
from torch import Tensor

from teal_cli.decode.sampling import draw


def accept_greedy(best: Tensor, drafted: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens that are the model's own choice.

    Args:
        best: (rows, drafted + 1) int64, the model's choice after the token before and after each drafted one.
        drafted: (rows, drafted) int64.

    Returns:
        (rows,) int64 numbers of accepted tokens, and (rows,) int64 the token behind them.
    """
    accepted = _leading(best[:, :-1] == drafted)
    return accepted, best.gather(1, accepted[:, None])[:, 0]


def accept_sampled(
    wanted: Tensor, drafted: Tensor, offered: Tensor | None, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Tokens distributed as `wanted` has them, whatever the draft.

    A drafted token is accepted with probability min(1, wanted / offered). At the first one that is not, the token is
    drawn from what `wanted` has more than `offered`; behind the last one, from `wanted`.

    Args:
        wanted: (rows, drafted + 1, vocabulary) probabilities of the model.
        drafted: (rows, drafted) int64.
        offered: (rows, drafted, vocabulary) probabilities from which the drafted tokens were drawn; None where nothing
            was drawn, and each was certain.
        generator: of random numbers, on the tensors' device.

    Returns:
        As `accept_greedy`.
    """
    rows, count = drafted.shape
    at = drafted[..., None]
    if offered is None:
        offered = torch.zeros_like(wanted[:, :count]).scatter_(2, at, 1.0)
    ratio = (wanted[:, :count].gather(2, at) / offered.gather(2, at))[..., 0]
    accepted = _leading(torch.rand(rows, count, generator=generator, device=wanted.device) < ratio)
    last = wanted.gather(1, accepted[:, None, None].expand(-1, 1, wanted.shape[2]))[:, 0]
    if count:
        taken = offered.gather(1, accepted.clamp(max=count - 1)[:, None, None].expand(-1, 1, wanted.shape[2]))[:, 0]
        rest = (last - taken).clamp_min(0)
        # Nothing is left where both are alike up to rounding: then no token of it could be refused but by rounding.
        was_refused = (accepted < count) & (rest.sum(-1) > 0)
        last = torch.where(was_refused[:, None], rest, last)
    return accepted, draw(last, generator)[:, 0]


def _leading(agrees: Tensor) -> Tensor:
    """(rows, n) bool -> (rows,) int64: how many are True before the first that is not."""
    return agrees.long().cumprod(1).sum(1)
