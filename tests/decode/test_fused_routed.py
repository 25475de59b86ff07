"""Routed MLPs on the fused path, in the interpreter, against transformers' forward."""

import pytest
import torch
from conftest import build_model
from fused_pair import Pair, random_tokens, session_of, use_small_tiles
from native_models import check_steps, tiny
from routed_models import routed

from teal_cli.decode.engine import Engine
from teal_cli.decode.paths.fused import FusedPath
from teal_cli.decode.paths.native import NativePath
from teal_cli.models.architectures import find_projections
from teal_cli.sparse import Rule, Threshold, control_of


@pytest.fixture(autouse=True)
def _small_tiles(own_tables: None, monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_tiles(monkeypatch)


@torch.no_grad()
@pytest.mark.parametrize(("group", "rank", "rows"), [(4, None, 1), (20, None, 3), (1, 12, 2)])
def test_logits_and_counts(group: int, rank: int | None, rows: int) -> None:
    sites = {p.name: p.site for p in find_projections(build_model("llama"))}
    rules: dict[str, Rule] = {name: Threshold(0.3, 0.3) for name, site in sites.items() if "attention" in site}
    model = routed(group, rank, elsewhere=rules if rows == 1 else None)
    check_steps(model, [12, 5, 9][:rows], 2, path="fused")


@torch.no_grad()
@pytest.mark.parametrize("enabled", [False, True])
def test_dense_steps_are_routed_too(enabled: bool) -> None:
    pair = Pair(model := routed(), control_of(model))
    caches = pair.caches(2)
    pair.control.enabled = enabled
    pair.step(random_tokens(2, 1), caches)
    assert session_of(pair, caches[1]).enabled == enabled


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gemma2", {}),  # gelu, and norms that add to the stream
        ("cohere2", {}),  # a layer norm, and an MLP beside the attention
    ],
)
def test_other_families(family: str, changes: dict[str, str]) -> None:
    check_steps(routed(of=tiny(family, **changes)), [12, 5], 2, path="fused")


def test_rows_of_groups_that_are_left_out_are_not_read() -> None:
    pair = Pair(model := routed(), control_of(model))
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.router.bias[0] = -1e3
    cache = pair.caches(1)[1]
    pair.control.backend = "triton"
    expected = pair.fused.step(random_tokens(1, 1), cache)
    for block in model.model.layers:
        for layer in block.mlp.layers[:2]:
            layer.weight.data[:4] = torch.inf
    cache.shorten([cache.length - 1])
    assert torch.equal(pair.fused.step(random_tokens(1, 1), cache), expected)


def test_the_engine_takes_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FusedPath, "devices", ("cpu",))
    monkeypatch.setattr(NativePath, "devices", ())
    engine = Engine(routed())
    assert (engine.path.name, engine.general_because) == ("fused", None)


def test_gate_and_up_that_do_not_lie_row_by_row_are_refused() -> None:
    model = routed()
    up = model.model.layers[1].mlp.up_proj
    up.weight.data = up.weight.data.t().contiguous().t()
    reason = "gate and up of model.layers.1.mlp that do not lie row by row"
    assert FusedPath.unsupported(model, control_of(model)) == reason
