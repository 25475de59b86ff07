"""What a slot, or a conversation, keeps of its prompts: what has the bits of a new pass, and nothing else."""

import random
from functools import partial
from threading import Event, Thread
from typing import Any

import pytest
import torch
from conftest import FAMILIES, VOCABULARY, build_family
from fused_pair import half_plan, random_tokens
from native_models import NO_LIBRARY
from torch import Tensor

from teal_cli.decode.engine import Engine
from teal_cli.decode.paths.native import NativePath
from teal_cli.decode.prompts import pieces, reusable
from teal_cli.decode.requests import Emitted, Request
from teal_cli.decode.sampling import SamplingConfig
from teal_cli.decode.scheduler import Scheduler
from teal_cli.models.architectures import architecture_of
from teal_cli.sparse import sparsify_

PIECE = 8
GREEDY = SamplingConfig()
PROGRAMS = [name for name in FAMILIES if architecture_of(FAMILIES[name]["model_type"]).program is not None]
pytestmark = pytest.mark.skipif(NO_LIBRARY is not None, reason=str(NO_LIBRARY))


def engine_of(family: str = "llama", **options: Any) -> Engine:
    model = build_family(family)
    sparsify_(model, half_plan(model))
    engine = Engine(model, path="native", **options)
    engine.path.piece = PIECE
    return engine


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each pass over a prompt had."""
    lengths: list[int] = []
    plain = NativePath.prefill

    def counted(self: NativePath, input_ids: Tensor, *args: Any) -> Tensor:
        lengths.append(input_ids.shape[1])
        return plain(self, input_ids, *args)

    monkeypatch.setattr(NativePath, "prefill", counted)
    return lengths


def talk(rng: random.Random, before: list[int], reply: list[int]) -> list[int]:
    """The next turn's prompt."""
    return [*before, *reply, *(rng.randrange(2, VOCABULARY) for _ in range(rng.randrange(3, 12)))]


def test_pieces_begin_at_multiples() -> None:
    assert list(pieces(0, 20, 8)) == [(0, 8), (8, 16), (16, 20)]
    assert list(pieces(5, 20, 8)) == [(5, 8), (8, 16), (16, 20)]
    assert list(pieces(0, 20, None)) == [(0, 20)]
    assert list(pieces(8, 8, 8)) == []


def test_what_can_be_used_again() -> None:
    known = list(range(30))
    assert reusable(known, known, 30, 8, "prompts") == 24
    assert reusable(known[:24], known, 30, 8, "prompts") == 16  # the last token is always run
    assert reusable([*known[:20], 99, 99], known, 30, 8, "prompts") == 16
    assert reusable(known, known, 10, 8, "prompts") == 8  # behind it was decoded
    assert reusable(known, known, 10, 8, "replies") == 29
    assert reusable(known, known, 30, 8, "nothing") == 0
    assert reusable(known, known, 30, None, "replies") == 0


@pytest.mark.parametrize("keep", ["prompts", "replies"])
def test_a_conversation_is_not_run_again(keep: Any, runs: list[int]) -> None:
    engine, plain = engine_of(keep=keep), engine_of()
    rng = random.Random(0)
    prompt: list[int] = talk(rng, [], list(range(2, 30)))
    before = 0
    for turn in range(5):
        ids = torch.tensor([prompt])
        texts = []
        for one in (plain, engine):
            runs.clear()
            texts.append(list(one.generate(ids, max_new_tokens=7, sampling=GREEDY)))
        if keep == "prompts":
            assert texts[0] == texts[1]
        new = len(prompt) - before
        checks = 3 if turn == 0 else 0  # passes of `Engine.check`
        assert sum(runs[checks:]) <= new + (PIECE + 7 if keep == "prompts" else 2)
        before = len(prompt)
        prompt = talk(rng, prompt, texts[1])


def test_an_interrupted_prompt_is_not_gone_on_from(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(keep="prompts")
    ids, other = random_tokens(1, 20), random_tokens(1, 20, seed=1)
    expected = [list(engine_of().generate(one, max_new_tokens=4, sampling=GREEDY)) for one in (ids, other)]
    assert list(engine.generate(ids, max_new_tokens=4, sampling=GREEDY)) == expected[0]
    prefill = engine.path.prefill
    with monkeypatch.context() as patch:

        def interrupted(input_ids: Tensor, *args: Any) -> Tensor:
            prefill(input_ids, *args)
            raise KeyboardInterrupt

        patch.setattr(engine.path, "prefill", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(engine.generate(other, max_new_tokens=4, sampling=GREEDY))
    assert list(engine.generate(ids, max_new_tokens=4, sampling=GREEDY)) == expected[0]
    assert list(engine.generate(other, max_new_tokens=4, sampling=GREEDY)) == expected[1]


def ask(scheduler: Scheduler, requests: list[Request]) -> list[list[Emitted]]:
    """What they are told, when all have ended."""
    heard: list[list[Emitted]] = [[] for _ in requests]
    ends = [Event() for _ in requests]

    def hear(own: list[Emitted], end: Event, emitted: Emitted) -> None:
        own.append(emitted)
        if emitted.finish is not None:
            end.set()

    for request, own, end in zip(requests, heard, ends, strict=True):
        scheduler.submit(request, partial(hear, own, end))
    for end in ends:
        end.wait()
    return heard


def test_slots_go_on_from_what_they_have(runs: list[int]) -> None:
    """Conversations of several people, turn by turn, in fewer slots than there are people and in as many."""
    plain = engine_of()
    for slots in (2, 3):
        engine = engine_of()
        scheduler = Scheduler(engine, slots=slots, positions=160)
        loop = Thread(target=scheduler.run)
        loop.start()
        rng = random.Random(1)
        prompts = [talk(rng, [], []) for _ in range(3)]
        cached = []
        for _ in range(4):
            for index, own in enumerate(ask(scheduler, [Request(tuple(prompt), 6) for prompt in prompts])):
                reply = [one.token for one in own if one.token is not None]
                ids = torch.tensor([prompts[index]])
                assert reply == list(plain.generate(ids, max_new_tokens=6, sampling=GREEDY))
                assert own[-1].usage.cached_tokens % PIECE == 0
                cached.append(own[-1].usage.cached_tokens)
                prompts[index] = talk(rng, prompts[index], reply)
        scheduler.stop()
        loop.join()
        statistics = scheduler.statistics()
        assert statistics.cached_tokens == sum(cached)
        assert slots == 2 or sum(cached) > 100  # of three who take turns in two slots each takes another's
        assert statistics.cache_kept > 0


@pytest.mark.parametrize("family", PROGRAMS)
def test_pieces_give_what_a_whole_prompt_gives(family: str) -> None:
    model = build_family(family)
    engine = Engine(model)
    if not isinstance(engine.path, NativePath) or engine.path.piece is None:
        return
    ids = random_tokens(1, 20)
    whole = engine.prefill(ids, engine.new_cache(24))
    cache = engine.new_cache(24)
    for start, end in pieces(0, 20, PIECE):
        logits = engine.prefill(ids[:, start:end], cache)
    assert float((logits - whole).norm() / whole.norm()) < 1e-5
