"""Timing decoding after a prompt that is read once, or anew."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from teal_cli.bench.decode import Prompt
from teal_cli.decode.cache import FixedCache


class _Engine:
    """An engine whose prefill writes ones, and is counted."""

    def __init__(self, device: str, *, own_kernels: bool) -> None:
        self.device = torch.device(device)
        self.path = SimpleNamespace(own_kernels=own_kernels)
        self.prefills = 0

    def new_cache(self, length: int, compiled: bool = False) -> FixedCache:
        return FixedCache(1, length)

    def prefill(self, ids: Tensor, cache: FixedCache) -> Tensor:
        self.prefills += 1
        states = torch.ones(1, 2, ids.shape[1], 4)
        cache.layers[0].update(states, states)
        return torch.full((1, 5), float(self.prefills))


@pytest.mark.parametrize(("own_kernels", "prefills"), [(True, 1), (False, 3)])
def test_our_own_path_reads_a_prompt_once(own_kernels: bool, prefills: int) -> None:
    engine: Any = _Engine("cpu", own_kernels=own_kernels)
    prompt = Prompt(engine, torch.zeros(1, 3, dtype=torch.int64), 2)
    found = [prompt.read() for _ in range(3)]
    assert engine.prefills == prefills
    for cache, logits in found:
        assert (cache.length, cache.positions) == (3, 5)
        assert torch.equal(cache.layers[0].keys[:, :, :3], torch.ones(1, 2, 3, 4))
        assert logits.shape == (1, 5)


def test_decoding_on_one_copy_leaves_the_others() -> None:
    engine: Any = _Engine("cpu", own_kernels=True)
    prompt = Prompt(engine, torch.zeros(1, 3, dtype=torch.int64), 2)
    first, _ = prompt.read()
    more = torch.full((1, 2, 1, 4), 7.0)
    first.layers[0].update(more, more)
    second, _ = prompt.read()
    second.layers[0].update(more, more)
    third, logits = prompt.read()
    assert (first.length, second.length, third.length) == (4, 4, 3)
    assert float(third.layers[0].keys.max()) == 1.0
    assert torch.equal(logits, torch.ones(1, 5))


def test_a_prompt_is_read_anew_on_another_path() -> None:
    """The engine takes another path where a step of its own gives other logits: the old cache is none of that."""
    engine: Any = _Engine("cpu", own_kernels=True)
    prompt = Prompt(engine, torch.zeros(1, 3, dtype=torch.int64), 2)
    prompt.read()
    engine.path = SimpleNamespace(own_kernels=False)
    for prefills in (2, 3):
        prompt.read()
        assert engine.prefills == prefills
