"""One model with the weights of its quantised self, and the same model packed."""

from typing import Any

import torch
from conftest import VOCABULARY, build_model
from torch import Tensor
from transformers import DynamicCache

from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.checkpoint.rules import Threshold
from teal_cli.models.architectures import find_projections
from teal_cli.models.layers import unstack_experts_
from teal_cli.quantise.model import pack_, quantise_
from teal_cli.schemes import Scheme
from teal_cli.sparse import sparsify_


def tokens(length: int) -> Tensor:
    return torch.randint(2, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0))


def packed_pair(family: str, scheme: str, output: bool) -> tuple[Any, Any, Any]:
    """A model with the quantised weights in place of its own, the same packed, and the control of that."""
    models = [build_model(family).requires_grad_(False) for _ in range(2)]
    for model in models:
        unstack_experts_(model)
    packs = [quantise_(model, Scheme.parse(scheme), output_layer=output) for model in models]
    names = [projection.name for projection in find_projections(models[0])]
    plan = SparsityPlan("uniform", 0.4, {name: Threshold(0.3, 0.4) for name in names})
    controls = [sparsify_(model, plan) for model in models]
    pack_(models[1], packs[1])
    return models[0], models[1], controls


@torch.no_grad()
def check_packed(family: str, scheme: str, output: bool) -> None:
    """Prompts and steps, masked and dense, by every backend."""
    plain, packed, (control, packed_control) = packed_pair(family, scheme, output)
    ids = tokens(12)
    with control.masked(0), packed_control.masked(0):
        expected = plain(ids).logits
        torch.testing.assert_close(packed(ids).logits, expected, rtol=1e-5, atol=1e-5)
    with control.dense(), packed_control.dense():
        torch.testing.assert_close(packed(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
    for backend, count in {"cpu": 4, "reference": 4, "triton": 2}.items():  # a step takes the interpreter seconds
        packed_control.backend = backend
        cache = DynamicCache(config=packed.config)
        steps = [packed(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(count)]
        torch.testing.assert_close(torch.cat(steps, dim=1), expected[:, :count], rtol=1e-4, atol=1e-4)
