"""What a token's position does: learned embeddings, the angles of rotary embeddings, ALiBi, queries that grow."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from teal_cli.decode.blocks import module_at, program_of
from teal_cli.models.forward import rope_of


def learned_positions(model: Any) -> tuple[Tensor, int] | None:
    """The embedding of positions, and the row of the first one, which in OPT is not 0; None where there is none."""
    path = program_of(model).positions
    if path is None:
        return None
    module = module_at(model, path)
    return module.weight.detach(), int(getattr(module, "offset", 0))


@torch.no_grad()
def rotary_tables(
    model: Any, positions: int, dtype: torch.dtype, last: int | None = None, kind: str | float | None = None
) -> tuple[Tensor, Tensor] | None:
    """cos and sin of every position, as the model's own module makes them: (positions, rotated size) each.

    None of a model without a rotary embedding. `last`: as in a pass whose last position is this one, on which long rope
    depends; of the positions behind it nothing is said. `kind`: of angles, where the module has several.
    """
    at = torch.arange(positions, device=next(model.parameters()).device)
    if last is not None:
        at = torch.cat([at.clamp(max=last), at.new_tensor([last])])
    found = rotary_at(model, at, dtype, kind)
    return None if found is None else (found[0][:positions].contiguous(), found[1][:positions].contiguous())


@torch.no_grad()
def rotary_at(
    model: Any, at: Tensor, dtype: torch.dtype, kind: str | float | None = None
) -> tuple[Tensor, Tensor] | None:
    """cos and sin of a pass over these positions, (n,): (n, rotated size) each; None without a rotary embedding."""
    program = program_of(model)
    if program.rotary is None:
        return None
    module = rotary_module(model, program.rotary)
    if isinstance(module, Tensor):
        sin, cos = (table.repeat(1, 2) for table in module[at.clamp(max=len(module) - 1)].to(dtype).chunk(2, dim=1))
        return cos, sin
    if isinstance(module, nn.ModuleList):  # one of each base
        bases = [cast(Any, own).config.rope_parameters["rope_theta"] for own in module]
        module, kind = module[bases.index(kind)], None
    kinds = () if kind is None else (kind,)
    cos, sin = (table[0] for table in module(torch.empty(0, dtype=dtype, device=at.device), at[None], *kinds))
    if program.pairs == "halves_once":
        cos, sin = cos.repeat(1, 2), sin.repeat(1, 2)
    return cos, -sin if program.pairs == "halves_backwards" else sin


def rotary_module(model: Any, path: str) -> Any:
    """What a program names as its rotary embedding: a module, or the tensor of a table.

    Raises:
        ArtefactError: there is none.
    """
    parent, _, name = path.rpartition(".")
    found = getattr(module_at(model, parent), name, None)
    return found if isinstance(found, Tensor) else module_at(model, path)


def long_rope_from(model: Any) -> int | None:
    """The position from which on a pass takes the other angles of long rope; None where there is no long rope."""
    rope = rope_of(model.config.get_text_config())
    return int(rope["original_max_position_embeddings"]) if rope.get("rope_type") == "longrope" else None


def growth_of(model: Any) -> tuple[float, int] | None:
    """By how much queries grow with their positions, and in steps of how many; None where they do not."""
    if not program_of(model).growing_queries:
        return None
    rope = rope_of(model.config.get_text_config())
    return float(rope["llama_4_scaling_beta"]), int(rope["original_max_position_embeddings"])


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
    rope = rope_of(model.config.get_text_config())
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]
    return any(kind.get("rope_type") == "dynamic" for kind in kinds)
