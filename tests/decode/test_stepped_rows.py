"""Greedy rows of a scheduler's steps: what the host reads of them, and what the next step is told."""

import pytest
import torch
from conftest import build_family
from fused_pair import half_plan, use_small_tiles
from native_models import NO_LIBRARY
from test_scheduler import Heard, alone, run

from teal_cli.decode import replies as replies_module
from teal_cli.decode.engine import Engine
from teal_cli.decode.requests import Request
from teal_cli.decode.scheduler import Scheduler
from teal_cli.sparse import sparsify_

NATIVE = pytest.param("native", marks=pytest.mark.skipif(NO_LIBRARY is not None, reason=str(NO_LIBRARY)))


def engine_on(path: str, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """A tiny sparse model, of which Triton's interpreter takes a few steps."""
    if path == "fused":
        use_small_tiles(monkeypatch)
        monkeypatch.setattr(Engine, "check", lambda self, prompt: None)
    model = build_family("llama")
    sparsify_(model, half_plan(model))
    return Engine(model, path=path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("path", ["general", NATIVE, "fused"])
def test_a_row_whose_logits_are_no_numbers_ends_alone(
    path: str, value: float, own_tables: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_on(path, monkeypatch)
    requests = [Request((5, 6, 7), 5), Request((9, 8), 5)]
    texts = [alone(engine, request) for request in requests]
    assert texts[0][2] not in texts[1] + texts[0][:2]
    with torch.no_grad():  # a token that ruins every step that reads it
        engine.model.get_input_embeddings().weight[texts[0][2]] = value
    heard = run(Scheduler(engine, slots=2, positions=64), requests)
    assert heard[0].tokens == texts[0][:3]
    assert heard[0].finish == "error"
    assert "not numbers" in str(heard[0].emitted[-1].error)
    assert heard[1].tokens == texts[1]


def test_what_is_read_is_a_part_of_a_fused_step(own_tables: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two replays nothing looks at logits again."""
    engine = engine_on("fused", monkeypatch)
    requests = [Request((5, 6, 7), 4), Request((9, 8), 4)]
    texts = [alone(engine, request) for request in requests]
    looked: list[tuple[int, ...]] = []
    look = replies_module._are_numbers

    def noted(logits: torch.Tensor) -> torch.Tensor:
        looked.append(tuple(logits.shape))
        return look(logits)

    monkeypatch.setattr(replies_module, "_are_numbers", noted)
    heard: list[Heard] = run(Scheduler(engine, slots=2, positions=64), requests)
    assert [own.tokens for own in heard] == texts
    assert [shape[0] for shape in looked] == [1, 1]  # after each prompt
