"""Whole sessions on a GPU, for the tests of this folder."""

from contextlib import nullcontext

import torch
from conftest import VOCABULARY
from torch import Tensor

from teal_cli.decode.engine import Engine
from teal_cli.sparse import control_of


def decoded(model: torch.nn.Module, rows: int, path: str, dense: bool) -> tuple[Tensor, dict[str, float]]:
    """Logits of 20 steps, float64, and realised sparsity."""
    control = control_of(model)
    control.backend = {"fused": "triton", "general": "reference"}[path]
    engine = Engine(model, path=path)
    ids = torch.randint(2, VOCABULARY, (rows, 40), generator=torch.Generator().manual_seed(0)).cuda()
    cache = engine.new_cache(40)
    engine.prefill(ids[:, :20], cache)
    with control.counting() as counter, control.switched_off() if dense else nullcontext():
        steps = [engine.step(ids[:, i : i + 1], cache).clone() for i in range(20, 40)]
    return torch.stack(steps).double(), counter.by_projection()
