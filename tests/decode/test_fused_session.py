"""Sessions of the fused path: how long they last, what they count, and the loop of steps."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conftest import build_model
from fused_pair import PROMPT, Pair, half_plan, random_tokens, session_of, use_small_tiles

from teal_cli.decode.loop import TokenLoop
from teal_cli.decode.sampling import Sampler, SamplingConfig
from teal_cli.errors import ArtefactError, UsageError
from teal_cli.sparse import apply_plan_
from teal_kernels.triton_gemv import MAX_ROWS


@pytest.fixture(autouse=True)
def _small_tiles(own_tables: None, monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_tiles(monkeypatch)


@pytest.fixture
def pair() -> Pair:
    return Pair(build_model("llama"))


def test_a_session_lasts_while_nothing_changes(pair: Pair) -> None:
    caches = pair.caches(1)
    pair.control.backend = "triton"
    session = session_of(pair, caches[1])
    for position in range(2):
        pair.step(random_tokens(1, 1, position), caches)
    assert not session.stale
    assert session_of(pair, caches[1]) is session


@pytest.mark.parametrize("change", ["plan", "switched off", "dense", "second prefill"])
def test_what_makes_a_session_stale(pair: Pair, change: str) -> None:
    """And the steps after it are right, within the change and after it."""
    control, caches = pair.control, pair.caches(1)
    control.backend = "triton"
    pair.step(random_tokens(1, 1), caches)
    session = session_of(pair, caches[1])
    assert not session.stale
    context: Any = nullcontext()
    if change == "plan":
        apply_plan_(pair.model, half_plan(pair.model, 1.5))
    elif change == "switched off":
        context = control.switched_off()
    elif change == "dense":
        context = control.dense()
    else:
        for engine, cache in zip((pair.plain, pair.fused), caches, strict=True):
            engine.prefill(random_tokens(1, 5, 7), cache)
    with context:
        assert session.stale
        pair.step(random_tokens(1, 1, 1), caches)
        assert session_of(pair, caches[1]) is not session
    pair.step(random_tokens(1, 1, 2), caches)


def test_two_caches_at_once(pair: Pair) -> None:
    """Sessions of one decoder share nothing that one step leaves for the next."""
    first, second = pair.caches(1), pair.caches(2, prompt=7)
    for position in range(2):
        pair.step(random_tokens(1, 1, position), first)
        pair.step(random_tokens(2, 1, position), second)


def test_a_cache_is_filled_to_its_last_position_and_not_beyond(pair: Pair) -> None:
    caches = pair.caches(1, positions=PROMPT + 1)
    pair.step(random_tokens(1, 1), caches)
    with pytest.raises(ArtefactError, match=f"cache is full: it was made for {PROMPT + 1} positions"):
        pair.fused.step(random_tokens(1, 1), caches[1])


def test_a_cache_that_was_reset(pair: Pair) -> None:
    caches = pair.caches(1)
    pair.step(random_tokens(1, 1), caches)
    caches[1].reset()
    fresh = pair.plain.new_cache(60)
    for engine, cache in ((pair.plain, fresh), (pair.fused, caches[1])):
        engine.prefill(random_tokens(1, 6, 8), cache)
    pair.step(random_tokens(1, 1, 1), (fresh, caches[1]))


def test_a_prompt_of_one_token(pair: Pair) -> None:
    caches = pair.caches(2, prompt=1)
    pair.step(random_tokens(2, 1), caches)


def test_logits_of_a_step_are_not_overwritten_by_the_next(pair: Pair) -> None:
    cache = pair.caches(1)[1]
    first = pair.fused.step(random_tokens(1, 1), cache)
    kept = first.clone()
    pair.fused.step(random_tokens(1, 1, 1), cache)
    assert torch.equal(first, kept)


def test_a_batch_of_nine_is_refused(pair: Pair) -> None:
    cache = pair.fused.new_cache(8)
    pair.fused.prefill(random_tokens(MAX_ROWS + 1, 4), cache)
    with pytest.raises(UsageError, match=r"a batch of 9 is more than .* \(8\)"):
        pair.fused.step(random_tokens(MAX_ROWS + 1, 1), cache)


def test_counting_begins_and_ends_with_its_block(pair: Pair) -> None:
    """Steps before and between two countings are in neither, and a second cache adds its own."""
    caches, control = pair.caches(1), pair.control
    control.backend = "triton"
    realised = []
    reference = []
    for engine, cache, into in ((pair.plain, caches[0], reference), (pair.fused, caches[1], realised)):
        control.backend = "reference" if engine is pair.plain else "triton"
        engine.step(random_tokens(1, 1), cache)
        with control.counting() as counter:
            engine.step(random_tokens(1, 1, 1), cache)
            into.append(counter.by_projection())
        engine.step(random_tokens(1, 1, 2), cache)
        with control.counting() as counter:
            engine.step(random_tokens(1, 1, 3), cache)
            into.append(counter.by_projection())
            other = engine.new_cache(8)
            engine.prefill(random_tokens(1, 4, 5), other)
            engine.step(random_tokens(1, 1, 4), other)
            into.append(counter.by_projection())
    assert realised == reference
    assert realised[0] != realised[1] != realised[2]


def test_a_counter_stays_as_it_was_when_its_block_ended(pair: Pair) -> None:
    cache = pair.caches(1)[1]
    with pair.control.counting() as counter:
        pair.fused.step(random_tokens(1, 1), cache)
        at_the_end = counter.by_projection()
    pair.fused.step(random_tokens(1, 1, 1), cache)
    assert counter.by_projection() == at_the_end


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_token_loop_equals_stepping_by_hand(pair: Pair, temperature: float) -> None:
    sampling = SamplingConfig(temperature=temperature, top_k=20, seed=3)
    plain_cache, cache = pair.caches(2)
    by_hand = Sampler(sampling, pair.plain.device)
    token, expected = random_tokens(2, 1), []
    pair.control.backend = "reference"
    for _ in range(5):
        token = by_hand.next_token(pair.plain.step(token, plain_cache))
        expected.append(token.tolist())
    pair.control.backend = "triton"
    loop = TokenLoop(pair.fused, cache, random_tokens(2, 1), Sampler(sampling, pair.fused.device))
    assert [loop.advance().tolist() for _ in range(5)] == expected
    assert len({str(tokens) for tokens in expected}) > 1
    assert cache.length == PROMPT + 5


def test_token_loop_follows_a_change_of_plan(pair: Pair) -> None:
    """And goes on with the token that it had chosen."""
    plain_cache, cache = pair.caches(1)
    greedy = Sampler(SamplingConfig(), pair.plain.device)
    plans = [half_plan(pair.model), half_plan(pair.model, 2.0)]
    token, expected = random_tokens(1, 1), []
    for step in range(4):
        apply_plan_(pair.model, plans[step // 2])
        with pair.control.switched_off() if step == 3 else nullcontext():
            token = greedy.next_token(pair.plain.step(token, plain_cache))
        expected.append(int(token))
    apply_plan_(pair.model, plans[0])
    loop = TokenLoop(pair.fused, cache, random_tokens(1, 1), greedy)
    got = []
    for step in range(4):
        if step == 2:
            apply_plan_(pair.model, plans[1])
        with pair.control.switched_off() if step == 3 else nullcontext():
            got.append(int(loop.advance()))
    assert got == expected


def test_generate(pair: Pair) -> None:
    """The same tokens as without the fused path, and the same counts."""
    found = {}
    for engine, backend in ((pair.plain, "reference"), (pair.fused, "triton")):
        pair.control.backend = backend
        with pair.control.counting() as counter:
            tokens = list(engine.generate(random_tokens(1, 9), max_new_tokens=5, sampling=SamplingConfig()))
            found[backend] = tokens, counter.by_projection()
    assert found["triton"] == found["reference"]
    assert len(found["triton"][0]) == 5
