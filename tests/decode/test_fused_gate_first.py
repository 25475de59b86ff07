"""Models that are sparse by their activation on the fused path, in Triton's interpreter, against transformers' forward."""

from pathlib import Path

import pytest
import torch
from fused_pair import LIMIT, Pair, error_of, random_tokens, session_of, use_small_tiles
from intrinsic_models import KINDS, save_kind

from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.checkpoint.rules import Threshold, Zeros
from teal_cli.decode.engine import Engine
from teal_cli.decode.paths.fused import FusedPath
from teal_cli.decode.paths.native import NativePath
from teal_cli.decode.sampling import SamplingConfig
from teal_cli.errors import UsageError
from teal_cli.model_loading import load_model
from teal_cli.models.architectures import find_projections
from teal_cli.sparse import control_of, make_intrinsic_, sparse_layers

THRESHOLDS = {"attention_input": 0.5, "attention_output": 0.2}
STEPS = 4


@pytest.fixture(autouse=True)
def _small_tiles(own_tables: None, monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_tiles(monkeypatch)


def _pair(tmp_path: Path, kind: str, thresholds: bool = False) -> Pair:
    model = load_model(save_kind(tmp_path / kind, kind), device="cpu", dtype="float32")
    elsewhere = None
    if thresholds:
        sites = {p.name: p.site.rpartition(".")[2] for p in find_projections(model)}
        rules = {name: Threshold(THRESHOLDS[site], 0.5) for name, site in sites.items() if site in THRESHOLDS}
        elsewhere = SparsityPlan("uniform", 0.5, dict(rules))
    make_intrinsic_(model, elsewhere)
    return Pair(model, control_of(model))


@pytest.mark.parametrize("thresholds", [False, True], ids=["zeros", "zeros and thresholds"])
@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_counts_equal_the_reference(tmp_path: Path, kind: str, rows: int, thresholds: bool) -> None:
    pair = _pair(tmp_path, kind, thresholds)
    control, caches = pair.control, pair.caches(rows)
    tokens = random_tokens(rows, STEPS, seed=1)
    logits, counted = {}, {}
    for engine, cache, backend in ((pair.plain, caches[0], "reference"), (pair.fused, caches[1], "triton")):
        control.backend = backend
        with control.counting() as counter:
            logits[backend] = [engine.step(tokens[:, i : i + 1], cache) for i in range(STEPS)]
            counted[backend] = counter.by_projection()
    for got, expected in zip(logits["triton"], logits["reference"], strict=True):
        assert error_of(got, expected) < LIMIT
    assert counted["triton"] == counted["reference"]
    for block in range(2):
        shares = {name: counted["triton"][f"model.layers.{block}.mlp.{name}"] for name in ("gate_proj", "up_proj")}
        assert shares["gate_proj"] == 0.0
        assert 0.3 < shares["up_proj"] < 0.9
        assert (counted["triton"][f"model.layers.{block}.self_attn.q_proj"] > 0.2) == thresholds
