"""One sparse model on two paths: the fused one in Triton's interpreter, and transformers' forward."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import VOCABULARY
from torch import Tensor, nn

from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.checkpoint.rules import Threshold
from teal_cli.decode.cache import FixedCache
from teal_cli.decode.engine import Engine
from teal_cli.decode.paths import fused_gate_first
from teal_cli.decode.paths.fused_session import FusedSession
from teal_cli.models.architectures import find_projections
from teal_cli.sparse import SparsityControl, sparsify_
from teal_kernels import triton_attention, triton_decode
from teal_kernels.triton_gate_first import GateFirstConfig, step_config
from teal_kernels.triton_gemv import TileConfig
from teal_kernels.tuning_entries import Entry, Provenance
from teal_kernels.tuning_files import keep_entries

LIMIT = 1e-5  # relative; float32 sums in another order give 1e-6
THRESHOLDS = {"attention_input": 0.5, "attention_output": 0.2, "mlp_input": 0.6, "mlp_intermediate": 0.3}
PROMPT = 20


def use_small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs, which is what the interpreter pays for; two split-K chunks and two blocks of outputs stay. Skipping
    pays at any sparsity, for several rows too.

    With `own_tables`, which it writes into.
    """
    sparse = TileConfig(64, 64, 1, 64, 1)
    configs = {0.0: (10.0, replace(sparse, dense=True)), 0.01: (5.0, sparse), 0.5: (5.0, sparse)}
    entries = [Entry(64, (64,), "float32", 1, "plain", s, cost, config) for s, (cost, config) in configs.items()]
    keep_entries(entries, "cpu", Provenance())
    monkeypatch.setattr(triton_attention, "_ATTENTION_PROGRAMS", 2)
    monkeypatch.setattr(triton_attention, "_ATTENTION_BLOCK", 128)
    monkeypatch.setattr(triton_decode, "_OUTPUT_BLOCK", 256)
    monkeypatch.setattr(triton_decode, "_BATCH_OUTPUT_BLOCK", 256)
    monkeypatch.setattr(fused_gate_first, "step_config", _few_programs)


def _few_programs(n_in: int, rows: int) -> GateFirstConfig:
    return replace(step_config(n_in, rows), neurons=32, block_out=16)


def half_plan(model: nn.Module, factor: float = 1.0) -> SparsityPlan:
    """About half of the inputs; `factor` moves the thresholds."""
    thresholds = {p.name: factor * THRESHOLDS.get(p.site.rpartition(".")[2], 0.4) for p in find_projections(model)}
    return SparsityPlan("uniform", 0.5, {name: Threshold(value, 0.5) for name, value in thresholds.items()})


def random_tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


class Pair:
    """One sparse model, decoded by the reference backend and by the fused path."""

    def __init__(self, model: Any, control: SparsityControl | None = None) -> None:
        self.model = model
        self.control = control or sparsify_(model, half_plan(model))
        self.plain = Engine(model, path="general")
        self.fused = Engine(model, path="fused")

    def caches(self, rows: int, positions: int = 60, prompt: int = PROMPT) -> tuple[Any, FixedCache]:
        """Both caches, after the same prompt."""
        ids = random_tokens(rows, prompt)
        caches = self.plain.new_cache(positions), self.fused.new_cache(positions)
        assert isinstance(caches[1], FixedCache)
        expected, got = self.plain.prefill(ids, caches[0]), self.fused.prefill(ids, caches[1])
        assert torch.equal(got, expected)
        return caches

    def step(self, token: Tensor, caches: tuple[Any, FixedCache]) -> Tensor:
        """One step of both, compared; the logits."""
        self.control.backend = "reference"
        expected = self.plain.step(token, caches[0])
        self.control.backend = "triton"
        got = self.fused.step(token, caches[1])
        assert error_of(got, expected) < LIMIT
        assert caches[1].length == caches[0].length
        return got


def error_of(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def session_of(pair: Pair, cache: FixedCache) -> FusedSession:
    session = pair.fused.open(cache)
    assert isinstance(session, FusedSession)
    return session
