"""Requests of a scheduler that are decoded from drafts: each has the text that the dense model gives it alone."""

import random
from typing import Any

import pytest
import torch
from native_models import NO_LIBRARY, sparse, tiny

from teal_cli.decode.engine import Engine
from teal_cli.decode.requests import Emitted, Request
from teal_cli.decode.sampling import SamplingConfig
from teal_cli.decode.scheduler import Scheduler
from teal_cli.decode.speculate.speculator import Speculator
from teal_cli.quantise.copies import quantised_copy
from teal_cli.sparse import control_of
from teal_cli.speculation import Speculation

PATHS = [pytest.param("native", marks=pytest.mark.skipif(NO_LIBRARY is not None, reason=str(NO_LIBRARY))), "general"]
KINDS = ["sparse", "int8", "int4:32+sparse", "lookup", "lookup+int8"]
VOCABULARY = 256


def speculator(engine: Engine, kind: str, count: int | None = None) -> Speculator:
    drafts = Speculation.parse(kind)
    draft = engine.model if drafts.has_model else None
    if drafts.scheme is not None:
        draft, _ = quantised_copy(engine.model, drafts.scheme)
    return Speculator(engine, draft, sparse=drafts.sparse, lookup=drafts.lookup, count=count)


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


def run(scheduler: Scheduler, requests: list[Request]) -> list[list[Emitted]]:
    heard: list[list[Emitted]] = [[] for _ in requests]
    for request, own in zip(requests, heard, strict=True):
        scheduler.submit(request, own.append)
    scheduler.stop()
    scheduler.run()
    return heard


def tokens_of(heard: list[Emitted]) -> list[int]:
    return [emitted.token for emitted in heard if emitted.token is not None]


@pytest.mark.parametrize("count", [None, 1, 4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", PATHS)
def test_texts_are_the_dense_model_s(path: str, kind: str, count: int | None) -> None:
    """Of requests that come and go beside each other, greedy or drawn."""
    engine = Engine(sparse(tiny("llama")), path=path)
    requests = requests_of(0, 12)
    scheduler = Scheduler(engine, slots=3, positions=100, speculator=speculator(engine, kind, count))
    heard = run(scheduler, requests)
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
