"""Many requests at once: each gives the text that it gives alone, whatever the others do."""

import random
from dataclasses import dataclass, field, replace
from threading import Thread
from typing import Any

import pytest
import torch
from conftest import build_family
from fused_pair import half_plan, use_small_tiles
from native_models import NO_LIBRARY

from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.checkpoint.rules import Dense, Rule, Threshold
from teal_cli.decode.engine import Engine
from teal_cli.decode.requests import Emitted, QueueFullError, Request
from teal_cli.decode.sampling import SamplingConfig
from teal_cli.decode.scheduler import Scheduler
from teal_cli.errors import UsageError
from teal_cli.sparse import apply_plan_, sparsify_


@dataclass
class Heard:
    """What a request was told."""

    emitted: list[Emitted] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return [one.token for one in self.emitted if one.token is not None]

    @property
    def finish(self) -> str | None:
        assert [one.finish for one in self.emitted[:-1]] == [None] * (len(self.emitted) - 1)
        return self.emitted[-1].finish


def alone(engine: Engine, request: Request) -> list[int]:
    """What the request gives by itself, at the rules that the model has now."""
    ids = torch.tensor([request.prompt])
    options = {"max_new_tokens": request.max_new_tokens, "sampling": request.sampling, "stop": request.stop}
    return list(engine.generate(ids, **options))


def alone_at(engine: Engine, request: Request, plans: dict[float, SparsityPlan]) -> list[int]:
    """The same at its level."""
    control = engine.control
    assert control is not None
    if request.sparsity == 0:
        with control.switched_off():
            return alone(engine, request)
    apply_plan_(engine.model, plans[request.sparsity or max(plans)])
    return alone(engine, request)


def random_request(rng: random.Random, **changes: Any) -> Request:
    prompt = tuple(rng.randrange(2, 300) for _ in range(rng.randrange(1, 20)))
    sampling = SamplingConfig(rng.choice([0.0, 0.8]), top_k=rng.choice([0, 5]), seed=rng.randrange(100))
    return Request(prompt, rng.randrange(1, 9), sampling, frozenset({rng.randrange(300)}), **changes)


def run(scheduler: Scheduler, requests: list[Request]) -> list[Heard]:
    heard = [Heard() for _ in requests]
    for request, own in zip(requests, heard, strict=True):
        scheduler.submit(request, own.emitted.append)
    scheduler.stop(drain=True)
    scheduler.run()
    return heard


PATHS = ["general", pytest.param("native", marks=pytest.mark.skipif(NO_LIBRARY is not None, reason=str(NO_LIBRARY)))]


def sparse_engine(path: str, family: str = "llama") -> Engine:
    model = build_family(family)
    sparsify_(model, half_plan(model))
    return Engine(model, path=path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("together", [True, False])
def test_texts_are_those_of_one_at_a_time(path: str, together: bool) -> None:
    engine = sparse_engine(path)
    rng = random.Random(0)
    requests = [random_request(rng) for _ in range(20)]
    heard = run(Scheduler(engine, slots=4, positions=64, together=together), requests)
    for request, own in zip(requests, heard, strict=True):
        assert own.tokens == alone(engine, request)
        assert own.finish == ("length" if len(own.tokens) == request.max_new_tokens else "stop")


@pytest.mark.parametrize(
    ("path", "family"), [("general", "llama"), ("native", "llama"), ("native", "mixtral"), ("fused", "llama")]
)
def test_rows_have_levels_of_their_own(
    path: str, family: str, own_tables: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "native" and NO_LIBRARY is not None:
        pytest.skip(NO_LIBRARY)
    use_small_tiles(monkeypatch)
    engine = sparse_engine(path, family)
    # The fused path reads a product whole where few inputs are skipped, for all rows.
    plans = {0.5: half_plan(engine.model), 0.7: (half_plan if path == "fused" else uneven_plan)(engine.model, 1.5)}
    rng = random.Random(1)
    levels = [0.0, 0.5, 0.7, None]
    requests = [random_request(rng, sparsity=levels[i % 4]) for i in range(16)]
    if path == "fused":  # in the interpreter a step takes a second
        monkeypatch.setattr(Engine, "check", lambda self, prompt: None)
        requests = [replace(request, max_new_tokens=3, stop=frozenset()) for request in requests[:3]]
    scheduler = Scheduler(engine, slots=3, positions=64, levels=plans)
    heard = run(scheduler, requests)
    texts = [own.tokens for own in heard]
    assert texts == [alone_at(engine, request, plans) for request in requests]
    others = [alone_at(engine, replace(request, sparsity=0.5), plans) for request in requests]
    assert texts != others  # or the levels are of no consequence
    sparsity = scheduler.statistics().realised_sparsity
    assert sparsity is not None
    assert 0.1 < sparsity < 0.7


def uneven_plan(model: Any, factor: float) -> SparsityPlan:
    """Rules that differ among the projections of one hidden state; some are dense."""
    rules: dict[str, Rule] = dict(half_plan(model, factor).projections)
    for index, (name, rule) in enumerate(list(rules.items())):
        rules[name] = Dense() if index % 4 == 1 else Threshold(rule.threshold * (0.8 + 0.05 * (index % 5)), 0.7)
    return SparsityPlan("uniform", 0.7, rules)


@pytest.mark.parametrize("path", PATHS)
def test_requests_are_cancelled_and_end_at_any_step(path: str) -> None:
    engine = sparse_engine(path)
    rng = random.Random(2)
    scheduler = Scheduler(engine, slots=3, positions=64, queue=100)
    requests = [random_request(rng) for _ in range(30)]
    heard = [Heard() for _ in requests]
    tickets = []
    for index, (request, own) in enumerate(zip(requests, heard, strict=True)):
        at = rng.choice([None, None, 0, 1, 3])  # tokens after which somebody cancels it
        if at == 0 and index % 2:  # before it has a slot
            tickets.append(scheduler.submit(request, own.emitted.append))
            scheduler.cancel(tickets[-1])
            continue

        def hear(emitted: Emitted, own: Heard = own, at: int | None = at, index: int = index) -> None:
            own.emitted.append(emitted)
            if at is not None and len(own.tokens) == at:
                scheduler.cancel(tickets[index])

        tickets.append(scheduler.submit(request, hear))
    scheduler.stop()
    scheduler.run()
    expected = [alone(engine, request) for request in requests]
    ways = set()
    for request, own, whole in zip(requests, heard, expected, strict=True):
        ways.add(own.finish)
        assert own.tokens == whole[: len(own.tokens)]
        assert own.finish == "cancelled" or own.tokens == whole
        assert own.emitted[-1].usage.completion_tokens == len(own.tokens)
        assert own.emitted[-1].usage.prompt_tokens == len(request.prompt)
    assert {"cancelled", "length"} <= ways
    statistics = scheduler.statistics()
    assert (statistics.running, statistics.queued, statistics.cache_used) == (0, 0, 0)
    assert sum(statistics.finished.values()) == len(requests)
    assert statistics.completion_tokens == sum(len(own.tokens) for own in heard)


def test_logits_that_are_no_numbers_end_their_request_alone() -> None:
    engine = sparse_engine("general")
    rng = random.Random(3)
    requests = [random_request(rng) for _ in range(4)]

    def ruin(logits: torch.Tensor, tokens: list[int]) -> None:
        if len(tokens) == 1:
            logits[5] = float("nan")

    requests[1] = replace(requests[1], mask=ruin, max_new_tokens=5, stop=frozenset())
    heard = run(Scheduler(engine, slots=2, positions=64), requests)
    assert [own.finish for own in heard].count("error") == 1
    assert len(heard[1].tokens) == 1
    assert "not numbers" in str(heard[1].emitted[-1].error)
    for request, own in zip(requests, heard, strict=True):
        assert request.mask is not None or own.tokens == alone(engine, request)


def test_an_error_ends_the_request_that_it_is_of() -> None:
    engine = sparse_engine("general")

    def fail(logits: torch.Tensor, tokens: list[int]) -> None:
        raise ValueError("no grammar\nmore lines")

    def refuse(emitted: Emitted) -> None:
        refused.append(emitted)
        raise OSError("the client has left")

    refused: list[Emitted] = []
    good, bad = Request((5, 6, 7), 4), Request((5, 6, 7), 4, mask=fail)
    scheduler = Scheduler(engine, slots=2, positions=32)
    heard = [Heard(), Heard()]
    scheduler.submit(bad, heard[0].emitted.append)
    scheduler.submit(good, refuse)
    scheduler.submit(good, heard[1].emitted.append)
    scheduler.stop()
    scheduler.run()
    assert (heard[0].finish, heard[0].emitted[-1].error) == ("error", "ValueError: no grammar")
    assert heard[1].tokens == alone(engine, good)
    assert len(refused) == 2  # its first token, and that it is over
    assert refused[1].finish == "cancelled"
    assert scheduler.statistics().cache_used == 0


def test_masks_and_logprobs() -> None:
    engine = sparse_engine("general")
    allowed = [7, 8, 9]

    def only(logits: torch.Tensor, tokens: list[int]) -> None:
        seen.append(tokens)
        kept = logits[allowed].clone()
        logits.fill_(float("-inf"))
        logits[allowed] = kept

    seen: list[list[int]] = []
    request = Request((5, 6, 7), 4, logprobs=2, mask=only)
    (own,) = run(Scheduler(engine, slots=2, positions=32), [request])
    assert set(own.tokens) <= set(allowed)
    assert seen == [own.tokens[:count] for count in range(4)]
    for emitted in own.emitted:
        assert len(emitted.top_logprobs) == 2
        assert emitted.logprob == max(emitted.top_logprobs.values())
        assert next(iter(emitted.top_logprobs)) == emitted.token
    logits = engine.prefill(torch.tensor([request.prompt]), engine.new_cache(8))
    (plain,) = run(Scheduler(engine, slots=2, positions=32), [replace(request, mask=None, logprobs=0)])
    expected = logits[0].float().log_softmax(-1)
    assert plain.emitted[0].logprob == pytest.approx(float(expected.max()), abs=1e-5)
    assert plain.emitted[0].top_logprobs == {}


def test_what_is_refused() -> None:
    engine = sparse_engine("general")
    scheduler = Scheduler(engine, slots=1, positions=16, queue=2)
    good = Request((5, 6), 3)
    for bad, reason in (
        (replace(good, prompt=()), "prompt"),
        (replace(good, max_new_tokens=0), "new token"),
        (replace(good, prompt=(5, 100_000)), "vocabulary"),
        (replace(good, prompt=(-1,)), "vocabulary"),
        (replace(good, max_new_tokens=15), "16 of a slot"),
        (replace(good, sparsity=0.3), "no sparsity 0.3 here, but 0, 0.5"),
        (replace(good, logprobs=-1), "logprobs"),
    ):
        with pytest.raises(UsageError, match=reason):
            scheduler.submit(bad, print)
    heard = [Heard() for _ in range(3)]
    for own in heard:
        scheduler.submit(good, own.emitted.append)
    with pytest.raises(QueueFullError, match="3 requests wait"):
        scheduler.submit(good, print)
    scheduler.stop(drain=False)
    with pytest.raises(QueueFullError, match="stops"):
        scheduler.submit(good, print)
    scheduler.run()
    assert [own.finish for own in heard] == ["cancelled"] * 3
    with pytest.raises(UsageError, match="no use"):
        Scheduler(engine, slots=0)


def test_a_request_has_its_time() -> None:
    engine = sparse_engine("general")
    scheduler = Scheduler(engine, slots=1, positions=64)
    heard = [Heard(), Heard()]
    scheduler.submit(Request((5, 6), 3, deadline_seconds=0.0), heard[0].emitted.append)
    scheduler.submit(Request((5, 6), 3, deadline_seconds=3600.0), heard[1].emitted.append)
    scheduler.stop()
    scheduler.run()
    assert [own.finish for own in heard] == ["time", "length"]


def test_threads_submit_while_the_loop_runs() -> None:
    engine = sparse_engine("general")
    scheduler = Scheduler(engine, slots=3, positions=64)
    loop = Thread(target=scheduler.run)
    loop.start()
    rng = random.Random(4)
    requests = [random_request(rng) for _ in range(12)]
    heard = [Heard() for _ in requests]

    def submit(some: range) -> None:
        for index in some:
            scheduler.submit(requests[index], heard[index].emitted.append)

    threads = [Thread(target=submit, args=(range(first, 12, 3),)) for first in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    scheduler.stop()
    loop.join()
    for request, own in zip(requests, heard, strict=True):
        assert own.tokens == alone(engine, request)
