"""Choosing tokens leaves the other cores to the native library's threads."""

from collections.abc import Iterator

import pytest
import torch
from conftest import build_model
from torch import Tensor

from teal_cli.decode.engine import Engine
from teal_cli.decode.requests import Request
from teal_cli.decode.sampling import Sampler, SamplingConfig
from teal_cli.decode.scheduler import Scheduler
from teal_cli.models.loading import threads_restored


@pytest.fixture(autouse=True)
def _three_threads() -> Iterator[None]:
    with threads_restored():
        torch.set_num_threads(3)
        yield


@pytest.mark.parametrize("work", ["next_token", "probabilities"])
def test_tokens_are_drawn_in_one_thread(work: str) -> None:
    """OpenMP's threads would spin on after it, where the next step's threads are to work."""
    sampler = Sampler(SamplingConfig(temperature=0.7), torch.device("cpu"))
    seen = []

    def look(_: object, scores: Tensor) -> Tensor:
        seen.append(torch.get_num_threads())
        return scores

    sampler._warpers.append(look)
    getattr(sampler, work)(torch.zeros(1, 10))
    assert (seen, torch.get_num_threads()) == ([1], 3)
    sampler._warpers.append(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sampler.next_token(torch.zeros(1, 10))
    assert torch.get_num_threads() == 3


@torch.no_grad()
def test_the_scheduler_chooses_in_one_thread() -> None:
    seen: list[int] = []
    request = Request((5, 6, 7), 4, mask=lambda logits, tokens: seen.append(torch.get_num_threads()))
    scheduler = Scheduler(Engine(build_model("llama")), slots=1, positions=32)
    tokens: list[int | None] = []
    scheduler.submit(request, lambda emitted: tokens.append(emitted.token))
    scheduler.stop(drain=True)
    scheduler.run()
    assert (len(tokens), set(seen)) == (4, {1})
