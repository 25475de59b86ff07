"""Tiny random models whose MLPs are routed."""

from collections.abc import Mapping
from typing import Any

import torch
from conftest import VOCABULARY, build_model

from teal_cli.checkpoint.rules import Routed, Rule
from teal_cli.sparse import sparsify_
from teal_cli.sparse.routing import plan_of_routers, set_random_routers_

SHARE = 0.6
"""Of groups that routers leave out."""


def text(rows: int = 4, length: int = 24, seed: int = 9) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def routed(
    group: int = 4,
    rank: int | None = None,
    *,
    of: Any = None,
    dtype: torch.dtype = torch.float32,
    share: float = SHARE,
    elsewhere: Mapping[str, Rule] | None = None,
) -> Any:
    """A model (the tiny Llama) with random routers that leave out a share of the groups."""
    model: Any = (build_model("llama") if of is None else of).to(dtype)
    sparsify_(model, plan_of_routers(model, Routed(group, rank, share), elsewhere))
    set_random_routers_(model, text(), share)
    return model
