"""The router of a mixture of experts: norm, logits, the choice of experts and their weights, in one launch.

A program computes one expert's logit for one token, so that a router of 128 experts occupies a GPU. It has its row of
weights under way before the kernel in front has ended. The last program of a token waits until the logits of all have
come, as the last programs of a product wait for partial sums, and compares each with each: the rank of an expert is the
number of those above it, and where logits are equal the one with the lower id is above. So there is no sort, and no
chain of choices. (Of more than 128 experts there is.) The same inputs give the same choice on every run, and nothing
waits for the host.

Importable without triton.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from teal_kernels.experts import Chosen
from teal_kernels.launching import EMPTY, TRITON_MISSING, launch, power_of_two
from teal_kernels.operands import Norm, Scratch
from teal_kernels.triton_gemv import norm_pointers

if TRITON_MISSING is None:
    from teal_kernels.jit_router import router_kernel

_SCORES = {"softmax": 0, "sparsemixer": 1}
_WARPS = 4
MAX_EXPERTS = 1024
"""Of one router, whose logits the program that chooses holds."""


@dataclass(frozen=True)
class Router:
    """What chooses experts."""

    weight: Tensor
    """(experts, in), contiguous; with `aside` one row more."""
    bias: Tensor | None = None
    """(experts,)"""
    scores: str = "softmax"
    """`softmax`: the largest logits are chosen, and weighted by the softmax of all. `sparsemixer`: the two largest,
    each weighted by the softmax of those left that are near to it (Phi-3.5-MoE)."""
    normalised: bool = False
    """Of `softmax`: whether the weights of the chosen ones sum to 1. That is the softmax of their logits alone."""
    jitter: float = 0.0
    """Of `sparsemixer`: half of the relative distance that counts as near."""
    aside: bool = False
    """Whether the last row is the gate of an expert that all tokens have, weighted by the sigmoid of its product."""

    @property
    def experts(self) -> int:
        """How many there are to choose from."""
        return self.weight.shape[0] - self.aside


def route(
    x: Tensor,
    router: Router,
    chosen: Chosen,
    scratch: Scratch,
    *,
    norm: Norm | None = None,
    aside_share: Tensor | None = None,
    pdl: bool = False,
) -> None:
    """One launch.

    Args:
        x: (tokens, in), contiguous.
        router: what chooses.
        chosen: its ids and weights are written, the highest first.
        scratch: memory between programs.
        norm: of x, before all else.
        aside_share: (tokens,) float32, written where the router has a gate aside.
        pdl: launch while the kernel before still runs, which must write neither weights nor norm weight.

    Raises:
        ValueError: sizes do not fit, or there are too many experts.
    """
    tokens, n_in = x.shape
    experts, count = router.experts, chosen.ids.shape[1]
    if experts > MAX_EXPERTS or count > experts or (router.scores == "sparsemixer" and count != 2):
        raise ValueError(
            f"a {router.scores} router of at most {MAX_EXPERTS} experts cannot choose {count} of {experts}"
        )
    if router.weight.shape[1] != n_in or chosen.ids.shape[0] != tokens:
        raise ValueError(f"a router of {tuple(router.weight.shape)} does not fit {tuple(x.shape)}")
    if router.aside != (aside_share is not None):
        raise ValueError("aside_share belongs to a router with a gate aside")
    squares = 1 if norm is None else norm.squares.shape[-1]
    launch(
        router_kernel,
        (router.weight.shape[0], tokens),
        x,
        None if norm is None else norm_pointers(norm),
        router.weight,
        router.bias,
        scratch.tensor("logits of experts", tokens * experts, torch.int32, EMPTY),
        chosen.ids,
        chosen.weights,
        aside_share,
        n_in,
        squares,
        0.0 if norm is None else norm.eps,
        2.0 * router.jitter,
        EXPERTS=experts,
        ASIDE=router.aside,
        BLOCK_EXPERTS=max(power_of_two(experts), 32 * _WARPS),
        CHOSEN=count,
        SCORES=_SCORES[router.scores],
        NORMALISED=router.normalised,
        NORM=norm is not None,  # the kernel cannot ask: triton 3.6 compares no tuple that holds None
        PLUS_ONE=norm is not None and norm.plus_one,
        CENTRED=norm is not None and norm.centred,
        SQUARES=power_of_two(squares),
        BLOCK_IN=power_of_two(n_in),
        warps=_WARPS,
        pdl=pdl,
    )
