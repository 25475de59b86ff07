"""The check before the first token, where steps read whole what would gain nothing by skipping."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import build_family
from fused_pair import half_plan, use_small_tiles

from teal_cli.decode.engine import Engine
from teal_cli.decode.loop import TokenLoop
from teal_cli.decode.paths import fused_launch
from teal_cli.decode.probe import _both_ways, difference
from teal_cli.sparse import sparse_layers, sparsify_

PROMPT = torch.arange(2, 14)[None]


def test_what_steps_read_whole_is_read_whole_in_what_they_must_give(
    own_tables: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or steps that are right would be taken for wrong ones where much is dropped and little of it pays."""
    use_small_tiles(monkeypatch)
    choose = fused_launch.choose_config

    def choose_whole(device: torch.device, *, epilogue: str, **product: Any) -> Any:
        config = choose(device, epilogue=epilogue, **product)
        return replace(config, dense=True) if epilogue in ("residual", "gated") else config

    monkeypatch.setattr(fused_launch, "choose_config", choose_whole)
    model = build_family("llama")
    sparsify_(model, half_plan(model, 2.0))
    engine = Engine(model, path="fused")
    rules = {name: layer.rule for name, layer in sparse_layers(model).items()}
    got, expected = _both_ways(engine, PROMPT)
    assert float(difference(got, expected).max()) < 1e-4
    assert {name: layer.rule for name, layer in sparse_layers(model).items()} == rules
    cache = engine.new_cache(16)
    engine.prefill(PROMPT, cache)
    whole = {name.rpartition(".")[2] for name in engine.open(cache).read_whole}
    assert whole == {"o_proj", "gate_proj", "up_proj", "down_proj"}
    monkeypatch.setattr(TokenLoop, "read_whole", frozenset())
    got, masked = _both_ways(engine, PROMPT)
    assert float(difference(got, masked).min()) > 0.1  # what they must not be compared with
