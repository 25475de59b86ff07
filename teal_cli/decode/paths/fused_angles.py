"""Rotary embeddings of the fused path: their tables of cosines and sines, as the attention kernel reads them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from teal_cli.decode.blocks import Attention, BlockStep, program_of
from teal_cli.decode.positions import long_rope_from, rotary_tables


@dataclass(frozen=True)
class Angles:
    """The tables of a rotary embedding: of each kind (positions, R) twice; with long rope (2, positions, R)."""

    tables: dict[str | float | None, tuple[Tensor, Tensor]]
    long_from: int | None

    @classmethod
    def of(cls, model: Any, blocks: list[list[BlockStep]], positions: int, dtype: torch.dtype) -> "Angles":
        """As the kernels read them, for a cache of so many positions."""
        first_long = long_rope_from(model)
        lasts = [None if first_long is None else first_long - 1]
        long_from = first_long if first_long is not None and positions > first_long else None
        if long_from is not None:
            lasts.append(positions - 1)
        tables: dict[str | float | None, tuple[Tensor, Tensor]] = {}
        for kind in {step.angles for steps in blocks for step in steps if isinstance(step, Attention) and step.rotates}:
            made = [rotary_tables(model, positions, dtype, last, kind) for last in lasts]
            found = [pair for pair in made if pair is not None]
            if not found:
                continue
            cos, sin = (torch.stack([_paired(pair[of], model) for pair in found]) for of in (0, 1))
            tables[kind] = (cos, sin) if long_from is not None else (cos[0], sin[0])
        return cls(tables, long_from)


def _paired(table: Tensor, model: Any) -> Tensor:
    """The angle of each dimension of a head: transformers has those of halves where it turns neighbours."""
    if program_of(model).pairs == "neighbours":
        return table[:, : table.shape[1] // 2].repeat_interleave(2, dim=1).contiguous()
    return table
