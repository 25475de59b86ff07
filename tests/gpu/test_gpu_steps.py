"""Families with rare attention, activations or norms, on a real GPU: the fused path's logits against float64.

Those of transformers' forward, with inputs dropped and without, of rows of different lengths.
"""

import copy
from typing import Any

import pytest
import torch
from conftest import VOCABULARY, build_model
from torch import Tensor

from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.checkpoint.rules import Threshold
from teal_cli.decode.engine import Engine
from teal_cli.models.architectures import find_projections
from teal_cli.models.layers import unstack_experts_
from teal_cli.quantise.model import pack_, quantise_
from teal_cli.schemes import Scheme
from teal_cli.sparse import control_of, sparsify_

FAMILIES = [
    *("gpt_oss", "granite_swa", "bloom", "mpt", "mpt-clip", "falcon-bias", "olmo", "olmo-clip", "bitnet", "nanochat"),
    *("persimmon", "apertus", "stablelm-norms", "stablelm-2-12b", "cohere-norms", "phi-norms", "gemma4_text"),
]
LIMIT = 1e-4  # relative; float32 sums in another order give 1e-6
LIMIT_OF_CODES = 1e-3
STEPS = 3


def _random(family: str) -> Any:
    """With biases, norms and sinks that are random too, on the GPU."""
    model = build_model(family).requires_grad_(False)
    unstack_experts_(model)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            parameter.normal_(0, 0.2)
        elif name.endswith("bias"):
            parameter.normal_(0, 0.1)
        else:
            parameter.uniform_(0.5, 1.5)
    return model.cuda()


def _tokens(rows: int, length: int, seed: int) -> Tensor:
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed)).cuda()


@torch.no_grad()
def _check(model: Any, lengths: list[int], limit: float, sparse: bool) -> None:
    """Steps of all rows together, against those of each row alone."""
    exact = copy.deepcopy(model).double()
    control_of(exact).backend = "reference"
    for one in (model, exact):
        control_of(one).enabled = sparse
    ids, tokens = _tokens(len(lengths), max(lengths), 0), _tokens(len(lengths), STEPS, 1)
    engine, plain = Engine(model, path="fused"), Engine(exact, path="general")
    cache = engine.new_cache(max(lengths) + STEPS)
    engine.prefill(ids, cache, torch.tensor(lengths))
    got = [engine.step(token, cache).clone() for token in tokens.split(1, dim=1)]
    for row, length in enumerate(lengths):
        alone = plain.new_cache(length + STEPS)
        plain.prefill(ids[row : row + 1, :length], alone)
        for step, logits in enumerate(got):
            expected = plain.step(tokens[row : row + 1, step : step + 1], alone)[0]
            error = float((logits[row] - expected).norm() / expected.norm())
            assert error < limit, (row, step, error)


def _plan(model: Any) -> SparsityPlan:
    # An expected sparsity at which no table has a product of four rows dense.
    rules = {projection.name: Threshold(0.3, 0.97) for projection in find_projections(model)}
    return SparsityPlan("uniform", 0.5, rules)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("lengths", [[20], [20, 5], [9, 20, 3, 17]], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_are_those_of_transformers(family: str, lengths: list[int], sparse: bool) -> None:
    model = _random(family)
    sparsify_(model, _plan(model))
    _check(model, lengths, LIMIT, sparse)


@pytest.mark.parametrize("scheme", ["int8", "int4:32"])
@pytest.mark.parametrize("lengths", [[20], [20, 5]], ids=str)
def test_experts_in_codes(scheme: str, lengths: list[int]) -> None:
    """gpt-oss's, whose gate and up alternate."""
    model = _random("gpt_oss")
    packs = quantise_(model, Scheme.parse(scheme))
    sparsify_(model, _plan(model))
    pack_(model, packs)
    _check(model, lengths, LIMIT_OF_CODES, sparse=True)
