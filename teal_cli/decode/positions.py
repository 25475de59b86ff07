"""What positions do beside the tables of a rotary embedding: ALiBi, and angles that depend on the longest row."""

from typing import Any

import torch
from torch import Tensor

from teal_cli.decode.blocks import program_of


@torch.no_grad()
def alibi_bias(model: Any, positions: int, heads: int, scale: float) -> Tensor | None:
    """What ALiBi adds to the score of each key's position: (heads, positions) float32; None of a model without it.

    The slopes are those of the paper (arXiv 2108.12409): powers of 2 ** (-8 / heads) where heads are a power of two,
    and of twice as many heads every second one for those that remain. `scale`: of scores.
    """
    alibi = program_of(model).alibi
    if alibi is None:
        return None
    power = 1 << (heads.bit_length() - 1)
    exponents = torch.cat(
        [torch.arange(1, power + 1) * (8 / power), torch.arange(1, max(1, 2 * (heads - power)), 2) * (4 / power)]
    )
    slopes, at = torch.exp2(-exponents.double()).float(), torch.arange(positions)
    if alibi == "scaled":
        return (slopes.bfloat16()[:, None] * at).to(model.dtype).float() * scale
    bias = slopes[:, None] * at
    return bias.to(model.dtype).float() if alibi == "rounded" else bias


def has_dynamic_rope(model: Any) -> bool:
    """Whether angles depend on the last position of a pass, and on those before it (dynamic NTK)."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]
    return any(kind.get("rope_type") == "dynamic" for kind in kinds)
