"""The choice of experts of a block, as the paths that execute block programs take it."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from teal_cli.models.programs import RouteStep


@dataclass(frozen=True)
class Route:
    """The choice of experts of one block."""

    weight: Tensor
    """(experts, hidden) of the router."""
    bias: Tensor | None
    """(experts,)"""
    top_k: int
    scores: str
    """As the program has it."""
    normalised: bool
    """Whether the weights of the chosen ones sum to 1."""
    jitter: float
    """Of `sparsemixer`: half of what counts as near."""


def route_of(step: RouteStep, config: Any, router: Any) -> Route:
    """A step with the numbers of a configuration and the weights of a router.

    Args:
        step: of a program.
        config: of the text model.
        router: a module with a weight (experts, hidden), and maybe a bias.
    """
    normalised = getattr(config, step.normalised) if isinstance(step.normalised, str) else step.normalised
    return Route(
        weight=router.weight,
        bias=getattr(router, "bias", None),
        # Sparsemixer chooses two experts, whatever the configuration says.
        top_k=2 if step.scores == "sparsemixer" else int(getattr(config, step.top_k)),
        scores=step.scores,
        normalised=bool(normalised),
        jitter=0.0 if step.jitter is None else float(getattr(config, step.jitter)),
    )
