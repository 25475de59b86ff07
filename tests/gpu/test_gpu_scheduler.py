"""The scheduler on a real GPU: texts of requests that come and go, in graphs that are captured once."""

import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import pytest
import torch
from conftest import VOCABULARY, build_family
from drafting import run_all

from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.checkpoint.rules import Threshold
from teal_cli.decode.engine import Engine
from teal_cli.decode.requests import Emitted, Request
from teal_cli.decode.sampling import SamplingConfig
from teal_cli.decode.scheduler import Scheduler
from teal_cli.decode.shared_slots import SharedSlots
from teal_cli.decode.speculate.speculator import Speculator
from teal_cli.models.architectures import find_projections
from teal_cli.quantise.copies import quantised_copy
from teal_cli.sparse import apply_plan_, control_of, sparsify_
from teal_cli.speculation import Speculation


def half_plan(model: torch.nn.Module, factor: float = 1.0) -> SparsityPlan:
    """About half of the inputs."""
    rules = {projection.name: Threshold(0.4 * factor, 0.5) for projection in find_projections(model)}
    return SparsityPlan("uniform", 0.5, rules)


def _requests(count: int, new_tokens: int) -> list[Request]:
    rng = random.Random(0)
    found = []
    for index in range(count):
        prompt = tuple(rng.randrange(2, VOCABULARY) for _ in range(rng.randrange(1, 40)))
        sampling = SamplingConfig(0.0 if index % 3 else 0.8, top_k=5, seed=index)
        found.append(Request(prompt, rng.randrange(1, new_tokens), sampling, frozenset({rng.randrange(VOCABULARY)})))
    return found


def _departures(
    engine: Engine,
    requests: list[Request],
    heard: list[list[Emitted]],
    alone: Callable[[Request], AbstractContextManager[object]] = nullcontext,
) -> list[tuple[int, float, int, int, int]]:
    """Requests whose texts are not those of one at a time: number, temperature, first place, tokens of both.

    Args:
        engine: whose model decodes them again.
        requests: that ran together.
        heard: of each.
        alone: what a request that runs alone runs inside.
    """
    found = []
    for index, (request, own) in enumerate(zip(requests, heard, strict=True)):
        tokens = [emitted.token for emitted in own if emitted.token is not None]
        with alone(request):
            options = {"max_new_tokens": request.max_new_tokens, "sampling": request.sampling, "stop": request.stop}
            expected = list(engine.generate(torch.tensor([request.prompt]), **options))  # type: ignore[arg-type]
        if tokens != expected:
            place = next((at for at, pair in enumerate(zip(tokens, expected, strict=False)) if pair[0] != pair[1]), -1)
            found.append((index, request.sampling.temperature, place, len(tokens), len(expected)))
    return found


def _assert_ended(heard: list[list[Emitted]]) -> None:
    for own in heard:
        assert own[-1].finish in ("stop", "length"), own[-1].error


@pytest.mark.usefixtures("skipping")
def test_texts_are_those_of_one_at_a_time() -> None:
    model = build_family("llama").cuda()
    sparsify_(model, half_plan(model))
    engine = Engine(model)
    assert engine.path.name == "fused"
    requests = _requests(40, 24)
    heard = run_all(Scheduler(engine, slots=5, positions=128), requests)
    _assert_ended(heard)
    others = _departures(engine, requests, heard)
    assert len(others) <= 2, others  # several rows add up in another order, and an input may lie beside its threshold


@pytest.mark.usefixtures("skipping")
def test_levels_and_graphs() -> None:
    """No capture of a graph at an admission: as many sessions as numbers of rows and highest levels."""
    model = build_family("llama").cuda()
    plans = {0.5: half_plan(model), 0.7: half_plan(model, 1.5)}
    sparsify_(model, plans[0.5])
    engine = Engine(model)
    requests = [replace(request, sparsity=[0.0, 0.5, 0.7][i % 3]) for i, request in enumerate(_requests(30, 24))]
    scheduler = Scheduler(engine, slots=4, positions=128, levels=plans)
    heard = run_all(scheduler, requests)
    assert isinstance(scheduler.slots, SharedSlots)
    assert len(scheduler.slots._sessions) <= 4 * 3

    def alone(request: Request) -> AbstractContextManager[object]:
        if request.sparsity == 0:
            return control_of(model).switched_off()
        apply_plan_(model, plans[request.sparsity or 0.5])
        return nullcontext()

    others = _departures(engine, requests, heard, alone)
    assert len(others) <= 2, others


@pytest.mark.usefixtures("skipping")
def test_after_first_steps_were_prepared_no_request_opens_a_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their graphs are captured by then; texts are those of one at a time, and no first step is counted."""
    model = build_family("llama").cuda()
    sparsify_(model, half_plan(model))
    engine = Engine(model)
    requests = _requests(20, 24)
    scheduler = Scheduler(engine, slots=4, positions=128)
    empty = scheduler.statistics()
    scheduler.slots.prepare([0.0, scheduler.levels.default])
    assert scheduler.statistics() == empty
    with monkeypatch.context() as patched:  # `undo` would undo what `skipping` does, too
        patched.setattr(type(engine.path), "open_rows", None)
        heard = run_all(scheduler, requests)
    _assert_ended(heard)
    assert isinstance(scheduler.slots, SharedSlots)
    assert all(session._graph is not None for session in scheduler.slots._sessions.values())
    others = _departures(engine, requests, heard)
    assert len(others) <= 2, others


@pytest.mark.parametrize("count", [None, 3])
@pytest.mark.parametrize("kind", ["sparse", "lookup+int8", "int4:32+sparse"])
def test_texts_from_drafts_are_the_dense_model_s(kind: str, count: int | None) -> None:
    """Greedy and drawn, beside others, while the device runs ahead of the host; a graph for each number of tokens."""
    model = build_family("llama").cuda()
    sparsify_(model, half_plan(model))
    engine = Engine(model)
    assert engine.path.name == "fused"
    drafts = Speculation.parse(kind)
    draft = model if drafts.scheme is None else quantised_copy(model, drafts.scheme)[0]
    speculator = Speculator(engine, draft, sparse=drafts.sparse, lookup=drafts.lookup, count=count)
    requests = [replace(own, max_new_tokens=20 + own.max_new_tokens) for own in _requests(30, 60)]
    scheduler = Scheduler(engine, slots=3, positions=160, speculator=speculator)
    heard = run_all(scheduler, requests)
    _assert_ended(heard)
    others = _departures(engine, requests, heard, lambda request: control_of(model).switched_off())
    assert len(others) <= 2, others  # as above: what is drawn may lie beside where another token is drawn
    statistics = scheduler.statistics()
    assert statistics.drafted_tokens
    if count is not None:
        assert statistics.accepted_tokens
        assert statistics.passes < statistics.completion_tokens
    assert isinstance(scheduler.slots, SharedSlots)
    assert len(scheduler.slots._sessions) <= 3 + 3 + (7 + 3 + 1)  # plain steps, drafts, and steps of several tokens


def test_a_row_whose_logits_are_no_numbers_ends_alone() -> None:
    """Within replays, which alone say so; whatever the other rows do."""
    model = build_family("llama").cuda()
    sparsify_(model, half_plan(model))
    engine = Engine(model)
    requests = [Request((5 + index, 6, 7), 24, sparsity=0.0) for index in range(3)]
    with control_of(model).switched_off():
        texts = [
            list(engine.generate(torch.tensor([own.prompt]), max_new_tokens=24, sampling=SamplingConfig()))
            for own in requests
        ]
    others = {*texts[1], *texts[2], *(token for own in requests for token in own.prompt)}
    at = next(at for at in range(6, 23) if texts[0][at] not in {*others, *texts[0][:at]})
    with torch.no_grad():  # a token that ruins every step that reads it
        model.get_input_embeddings().weight[texts[0][at]] = torch.nan
    heard = run_all(Scheduler(engine, slots=3, positions=64), requests)
    assert [emitted.token for emitted in heard[0]] == [*texts[0][: at + 1], None]
    assert "not numbers" in str(heard[0][-1].error)
    for own, text in zip(heard[1:], texts[1:], strict=True):
        assert [emitted.token for emitted in own] == text
