"""What the attention kernel does with the heads of a block: their norms, and what joins their scores."""

from collections.abc import Sequence

import torch
from torch import Tensor

from teal_cli.decode.blocks import Attention, Norm
from teal_kernels.triton_attention import Heads


def weight_of_norms(norms: Sequence[Norm]) -> Tensor | None:
    """(head size,) of one norm for all heads, (heads * head size,) of each head's own; None where there is none."""
    if not norms:
        return None
    if len(norms) == 1:
        return norms[0].weight.detach().flatten()
    return torch.cat([norm.weight.detach().flatten() for norm in norms])


def heads_of(
    step: Attention,
    *,
    neighbours: bool,
    growth: tuple[float, int] | None,
    long_from: int | None,
    alibi: Tensor | None,
) -> Heads:
    """As the kernel takes it; what a block alone does not say is given."""
    (q_norm, *_), (k_norm, *_) = ((*norms, None) for norms in (step.q_norms, step.k_norms))
    biases = None
    if q_norm is not None and k_norm is not None and q_norm.bias is not None and k_norm.bias is not None:
        biases = q_norm.bias.detach(), k_norm.bias.detach()
    return Heads(
        norms=step.norms_of,
        centred=q_norm is not None and q_norm.centred,
        biases=biases,
        plus_one=step.plus_one,
        neighbours=neighbours,
        grouped=step.grouped,
        cap=step.cap,
        growth=growth,
        long_from=long_from,
        clip=step.clip,
        sinks=None if step.sinks is None else step.sinks.detach(),
        alibi=alibi,
        keys_as_values=step.keys_as_values,
        v_norm=weight_of_norms(step.v_norms),
    )


def cannot_attend(step: Attention) -> str | None:
    """Why the kernel has not what an attention needs; None where it has all."""
    for norms in (step.q_norms, step.k_norms):
        if norms and norms[0].centred and step.norms_of != "heads":
            return "layer norms of heads that are rotated, or of all heads"
        if len(step.v_norms) > 1 or any(norm.centred for norm in step.v_norms):
            return "norms of values that are layer norms, or each head's own"
        if len(norms) > 1 and any(norm.bias is not None for norm in norms):
            return "norms of each head with biases"
    return None
