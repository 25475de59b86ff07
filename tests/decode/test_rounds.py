"""Requests of a scheduler that are decoded from drafts: each has the text that the dense model gives it alone."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from drafting import run_all, speculator
from fused_pair import error_of, half_plan, use_small_tiles
from native_models import NO_LIBRARY, sparse, tiny

from teal_cli.decode.engine import Engine
from teal_cli.decode.requests import Emitted, Request
from teal_cli.decode.sampling import SamplingConfig
from teal_cli.decode.scheduler import Scheduler
from teal_cli.decode.shared_slots import SharedSlots
from teal_cli.decode.speculate import rounds as rounds_module
from teal_cli.errors import UsageError
from teal_cli.sparse import apply_plan_, control_of, sparsify_

needs_library = pytest.mark.skipif(NO_LIBRARY is not None, reason=str(NO_LIBRARY))
PATHS = [pytest.param("native", marks=needs_library), "general"]
VOCABULARY = 256


def requests_of(seed: int, count: int, **changes: Any) -> list[Request]:
    """Prompts that repeat themselves and such that do not; greedy and drawn; some end at a stop token."""
    rng = random.Random(seed)
    found = []
    for index in range(count):
        words = [rng.randrange(2, VOCABULARY) for _ in range(rng.randrange(1, 12))]
        prompt = tuple(words * (1 + index % 3))
        sampling = SamplingConfig(0.0 if index % 2 else 0.7, top_k=rng.choice([0, 8]), seed=rng.randrange(100))
        stop = frozenset(rng.randrange(VOCABULARY) for _ in range(4))
        found.append(Request(prompt, rng.randrange(1, 40), sampling, stop, **changes))
    return found


def dense_text(engine: Engine, request: Request) -> list[int]:
    """What the request gives by itself."""
    ids, options = torch.tensor([request.prompt]), {"max_new_tokens": request.max_new_tokens}
    with control_of(engine.model).switched_off():
        return list(engine.generate(ids, **options, sampling=request.sampling, stop=request.stop))


def tokens_of(heard: list[Emitted]) -> list[int]:
    return [emitted.token for emitted in heard if emitted.token is not None]


@pytest.mark.parametrize(
    ("path", "kind", "count"),
    [
        *(
            pytest.param("native", kind, count, marks=needs_library)
            for kind in ("sparse", "int8", "int4:32+sparse", "lookup", "lookup+int8")
            for count in (None, 1, 4)
        ),
        ("general", "sparse", 4),
        ("general", "lookup+int8", None),
        ("general", "int4:32+sparse", 2),
    ],
)
def test_texts_are_the_dense_model_s(path: str, kind: str, count: int | None) -> None:
    """Of requests that come and go beside each other, greedy or drawn."""
    engine = Engine(sparse(tiny("llama")), path=path)
    requests = requests_of(0, 12)
    scheduler = Scheduler(engine, slots=3, positions=100, speculator=speculator(engine, kind, count))
    heard = run_all(scheduler, requests)
    for request, own in zip(requests, heard, strict=True):
        assert tokens_of(own) == dense_text(engine, request)
        assert own[-1].finish == ("length" if len(tokens_of(own)) == request.max_new_tokens else "stop")
    statistics = scheduler.statistics()
    assert statistics.accepted_tokens == sum(own[-1].usage.accepted_tokens for own in heard)
    assert statistics.completion_tokens <= statistics.passes + statistics.accepted_tokens + len(requests)
    assert statistics.realised_sparsity is None  # what drafts skip is not the requests'
    if count is not None:
        assert 0 < statistics.accepted_tokens <= statistics.drafted_tokens
        assert statistics.passes < statistics.completion_tokens


@pytest.mark.parametrize("path", PATHS)
def test_what_requests_choose_by_is_kept(path: str) -> None:
    """Probabilities, a grammar, and a grammar that fails between drafted tokens; with a device that runs ahead."""
    engine = Engine(sparse(tiny("llama")), path=path)
    seen: dict[bool, list[list[int]]] = {True: [], False: []}

    def masked(drafts: bool) -> list[Request]:
        def even(logits: torch.Tensor, tokens: list[int]) -> None:
            seen[drafts].append(tokens)
            logits[1::2] = float("-inf")

        def fail(logits: torch.Tensor, tokens: list[int]) -> None:
            if len(tokens) == 5:
                raise ValueError("no grammar")

        one = Request((5, 6, 7, 8), 20)
        return [
            replace(one, mask=even),
            replace(one, mask=fail),
            replace(one, logprobs=2),
            replace(one, prompt=(9, 8), logprobs=0, sampling=SamplingConfig(0.8, seed=2)),
        ]

    plain = run_all(Scheduler(engine, slots=4, positions=40, default=0.0), masked(False))
    scheduler = Scheduler(engine, slots=4, positions=40, speculator=speculator(engine, "int8", 1))
    scheduler._ahead = 1
    found = run_all(scheduler, masked(True))
    assert [tokens_of(own) for own in found] == [tokens_of(own) for own in plain]
    assert [own[-1].finish for own in found] == ["length", "error", "length", "length"]
    assert [len(tokens) for tokens in seen[True]] == list(range(20))
    assert seen[True] == seen[False]
    for own, other in zip(found[2] + found[3], plain[2] + plain[3], strict=True):
        assert own.logprob == pytest.approx(other.logprob, abs=1e-5)
        assert own.top_logprobs == pytest.approx(dict(other.top_logprobs), abs=1e-5)
    assert scheduler.statistics().accepted_tokens > 0


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("kind", ["sparse", "lookup+int8"])
@needs_library
def test_long_prompts_come_in_the_middle(kind: str, ahead: int) -> None:
    """Of several pieces, some of which a slot has kept; and the device may run ahead of the host."""
    engine = Engine(sparse(tiny("llama", max_position_embeddings=512)), path="native")
    rng = random.Random(3)
    shared = tuple(rng.randrange(2, VOCABULARY) for _ in range(130))
    requests = [replace(request, stop=frozenset()) for request in requests_of(1, 12)]
    requests = [replace(own, prompt=shared + own.prompt) if i % 3 else own for i, own in enumerate(requests)]
    scheduler = Scheduler(engine, slots=2, positions=300, speculator=speculator(engine, kind))
    scheduler._ahead = ahead
    heard = run_all(scheduler, requests)
    assert [tokens_of(own) for own in heard] == [dense_text(engine, request) for request in requests]
    assert scheduler.statistics().cached_tokens > 0


@needs_library
@pytest.mark.parametrize("together", [True, False])
def test_sparse_requests_decode_beside_dense_ones(together: bool) -> None:
    """At their own levels, without drafts; drafts skip at the level that is theirs."""
    model = sparse(tiny("llama"))
    engine = Engine(model, path="native")
    plans = {0.5: half_plan(model), 0.7: half_plan(model, 1.5)}
    levels = [0.0, None, 0.5, 0.0, 0.7]
    requests = [replace(own, sparsity=levels[i % 5]) for i, own in enumerate(requests_of(2, 15))]
    scheduler = Scheduler(
        engine,
        slots=3,
        positions=100,
        levels=plans,
        speculator=speculator(engine, "sparse", 2),
        draft_level=0.5,
        together=together,
    )
    assert scheduler.levels.default == 0
    heard = run_all(scheduler, requests)
    for request, own in zip(requests, heard, strict=True):
        if request.sparsity:
            apply_plan_(model, plans[request.sparsity])
            ids, options = torch.tensor([request.prompt]), {"max_new_tokens": request.max_new_tokens}
            wanted = list(engine.generate(ids, **options, sampling=request.sampling, stop=request.stop))
            assert own[-1].usage.accepted_tokens == 0
        else:
            wanted = dense_text(engine, request)
        assert tokens_of(own) == wanted
    statistics = scheduler.statistics()
    assert statistics.accepted_tokens > 0
    assert 0.1 < statistics.realised_sparsity < 0.9


@needs_library
def test_a_slot_keeps_what_was_accepted_and_nothing_else() -> None:
    engine = Engine(sparse(tiny("llama")), path="native")
    request = Request((5, 6, 7, 8, 9), 30)
    scheduler = Scheduler(engine, slots=2, positions=64, keep="replies", speculator=speculator(engine, "int4:32", 7))
    (own,) = run_all(scheduler, [request])
    statistics, slots = scheduler.statistics(), scheduler.slots
    assert 0 < statistics.accepted_tokens < statistics.drafted_tokens
    assert isinstance(slots, SharedSlots)
    text = [*request.prompt, *tokens_of(own)]
    slot = slots.choose_slot([0, 1], text)
    length = slots.length(slot)
    assert length == len(text) - 1  # nobody has read the last token
    dense = engine.new_cache(64)
    with torch.no_grad(), control_of(engine.model).switched_off():
        engine.prefill(torch.tensor([request.prompt]), dense)
        for token in text[len(request.prompt) : length]:
            engine.step(torch.tensor([[token]]), dense)
    kept = slots._cache.some(range(slots._place[slot], slots._place[slot] + 1))
    for one, other in zip(kept.layers, dense.layers, strict=True):
        for state, expected in zip(one.states_of(0, length), other.states_of(0, length), strict=True):
            assert error_of(state, expected) < 1e-6


@needs_library
def test_where_drafts_do_not_pay_steps_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock on which everything takes a second, and a draft ten."""
    engine = Engine(sparse(tiny("llama")), path="native")
    scheduler = Scheduler(engine, slots=1, positions=220, speculator=speculator(engine, "int8"))
    now, draft = [0.0], scheduler.slots.draft

    def slowly(rows: Any) -> Any:
        now[0] += 10
        return draft(rows)

    def clock() -> float:
        now[0] += 1
        return now[0]

    monkeypatch.setattr(scheduler.slots, "draft", slowly)
    monkeypatch.setattr(rounds_module.time, "perf_counter", clock)
    request = Request((5, 6, 7), 200)
    (own,) = run_all(scheduler, [request])
    assert tokens_of(own) == dense_text(engine, request)
    assert 0 < scheduler.statistics().drafted_tokens < 20


def test_on_the_fused_path(own_tables: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter, two sequences of three tokens each."""
    use_small_tiles(monkeypatch)
    monkeypatch.setattr(Engine, "check", lambda self, prompt: None)
    model = tiny("llama")
    sparsify_(model, half_plan(model))
    engine = Engine(model, path="fused")
    requests = [Request((5, 6, 7), 8), Request((9, 8), 6, SamplingConfig(0.8, seed=1))]
    scheduler = Scheduler(engine, slots=2, positions=40, speculator=speculator(engine, "sparse", 2))
    heard = run_all(scheduler, requests)
    general = Engine(model, path="general")
    assert [tokens_of(own) for own in heard] == [dense_text(general, request) for request in requests]
    assert scheduler.statistics().accepted_tokens > 0


def test_a_level_of_drafts_that_there_is_not() -> None:
    engine = Engine(sparse(tiny("llama")), path="general")
    with pytest.raises(UsageError, match="there is no sparsity 0.9 here"):
        Scheduler(engine, positions=40, speculator=speculator(engine, "sparse"), draft_level=0.9)
