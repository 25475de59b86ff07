"""Many requests at once: each gives the text that it gives alone, whatever the others do."""

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from conftest import build_family
from fused_pair import half_plan
from native_models import NO_LIBRARY

from teal_cli.decode.engine import Engine
from teal_cli.decode.requests import Emitted, Request
from teal_cli.decode.sampling import SamplingConfig
from teal_cli.decode.scheduler import Scheduler
from teal_cli.sparse import sparsify_


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
    ids = torch.tensor([request.prompt])
    return list(
        engine.generate(ids, max_new_tokens=request.max_new_tokens, sampling=request.sampling, stop=request.stop)
    )


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
