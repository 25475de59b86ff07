"""Greedy rows of a scheduler's steps: what the host reads of them, and what the next step is told."""

import random
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import pytest
import torch
from conftest import build_family
from fused_pair import half_plan, use_small_tiles
from native_models import NO_LIBRARY
from test_scheduler import Heard, alone, run
from torch import Tensor

from teal_cli.decode import replies as replies_module
from teal_cli.decode.engine import Engine
from teal_cli.decode.levels import Levels
from teal_cli.decode.paths.graphs import SteppedSession
from teal_cli.decode.paths.program_session import ProgramSession
from teal_cli.decode.picked import Picked, PickedToken, Token, tensor_of
from teal_cli.decode.requests import Emitted, Request
from teal_cli.decode.sampling import SamplingConfig
from teal_cli.decode.scheduler import Scheduler
from teal_cli.decode.shared_slots import SharedSlots
from teal_cli.decode.slots import Drafting, Row
from teal_cli.sparse import sparsify_

needs_library = pytest.mark.skipif(NO_LIBRARY is not None, reason=str(NO_LIBRARY))
NATIVE = pytest.param("native", marks=needs_library)


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


class Brought:
    """Steps of sessions, and how many of them were brought their tokens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps = self.brought = 0
        step, bring = SteppedSession.step, SteppedSession._bring

        def stepped(session: SteppedSession, tokens: Sequence[Token]) -> tuple[Tensor, Tensor]:
            self.steps += 1
            return step(session, tokens)

        def bringing(session: SteppedSession, tokens: Sequence[Token]) -> None:
            self.brought += 1
            bring(session, tokens)

        monkeypatch.setattr(SteppedSession, "step", stepped)
        monkeypatch.setattr(SteppedSession, "_bring", bringing)


def greedy(prompt: Sequence[int], tokens: int, **changes: Any) -> Request:
    return Request(tuple(prompt), tokens, **changes)


@pytest.mark.parametrize("path", [NATIVE, "fused"])
def test_rows_that_stay_are_brought_once(path: str, own_tables: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three streams begin one after the other; from then on a step has its input already."""
    engine = engine_on(path, monkeypatch)
    requests = [greedy((5, 6, 7), 9), greedy((9, 8), 8), greedy((4, 3, 2, 1), 7)]
    texts = [alone(engine, request) for request in requests]
    counted = Brought(monkeypatch)
    heard = run(Scheduler(engine, slots=3, positions=64), requests)
    assert [own.tokens for own in heard] == texts
    assert (counted.steps, counted.brought) == (8, 3)  # after each prompt


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("seed", range(3))
@needs_library
def test_streams_that_come_and_go(seed: int, ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy beside drawn, masked and counted ones, at two levels; some are cancelled in the middle."""
    engine = engine_on("native", monkeypatch)
    rng = random.Random(seed)

    def even(logits: Tensor, tokens: list[int]) -> None:
        logits[1::2] = -torch.inf

    requests, cancelled_at = [], []
    for index in range(24):
        prompt = [rng.randrange(2, 250) for _ in range(rng.randrange(1, 12))]
        kind = {8: {"sampling": SamplingConfig(0.8, seed=index)}, 9: {"mask": even}, 10: {"logprobs": 2}}
        changes = kind.get(rng.randrange(12), {})
        requests.append(greedy(prompt, rng.randrange(2, 30), sparsity=rng.choice([0.0, 0.5, 0.5]), **changes))
        cancelled_at.append(rng.randrange(1, 6) if index % 6 == 5 else None)
    wanted = [heard_alone(engine, request) for request in requests]
    counted = Brought(monkeypatch)
    scheduler = Scheduler(engine, slots=4, positions=64)
    scheduler._ahead = ahead
    heard, tickets = [Heard() for _ in requests], []

    def hear(index: int, emitted: Emitted) -> None:
        heard[index].emitted.append(emitted)
        if len(heard[index].tokens) == cancelled_at[index]:
            scheduler.cancel(tickets[index])

    for index, request in enumerate(requests):
        tickets.append(scheduler.submit(request, partial(hear, index)))
    scheduler.stop()
    scheduler.run()
    for own, text, at in zip(heard, wanted, cancelled_at, strict=True):
        assert own.tokens == text[: len(own.tokens)]
        assert own.finish == "length" or (at is not None and own.finish == "cancelled")
        assert own.finish == "cancelled" or len(own.tokens) == len(text)
    assert "cancelled" in {own.finish for own in heard}
    assert 0 < counted.brought < counted.steps


def heard_alone(engine: Engine, request: Request) -> list[int]:
    """By a scheduler that has nothing else to do, and steps whose tokens are all brought."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Picked, "are_next", lambda self, tokens: False)
        (own,) = run(Scheduler(engine, slots=1, positions=64, keep="nothing"), [request])
    return own.tokens


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("together", [True, False])
@needs_library
@torch.no_grad()
def test_any_of_the_sequences_are_stepped(seed: int, together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any order, by any session, whose tokens others have still; some are drafted for, and some chosen otherwise."""
    engine = engine_on("native", monkeypatch)
    rng = random.Random(seed)
    prompts = [(5, 6, 7), (9, 8), (4, 3, 2, 1), (7,)]
    texts = [alone(engine, greedy(prompt, 25)) for prompt in prompts]
    levels = Levels(engine.model, engine.control, None, 0.0)
    slots = SharedSlots(engine, 4, 64, levels, "nothing", together=together, drafting=Drafting(engine.path, 0.0))
    level, found, tokens = max(levels.all), [list[int]() for _ in prompts], list[Token]()
    for slot, prompt in enumerate(prompts):
        slots.begin(slot, prompt)
        _, logits = slots.run_prompt(slot, prompt, 0)
        assert logits is not None
        tokens.append(logits.argmax(-1))
        found[slot].append(int(tensor_of(tokens[slot])))
    some = list(range(4))
    while any(len(text) < 25 for text in found):
        if rng.random() < 0.5:
            some = rng.sample(range(4), rng.randrange(1, 5))
        some = [slot for slot in some if len(found[slot]) < 25]
        if not some:
            continue
        if rng.random() < 0.2:
            lengths = [slots.length(slot) for slot in some]
            for _ in range(2):
                slots.draft([Row(slot, level, tokens[slot]) for slot in some])
            for slot, length in zip(some, lengths, strict=True):
                slots.cut(slot, length)
        step = slots.step([Row(slot, level, tokens[slot]) for slot in some])
        picked = step.picked or Picked(step.best[:, 0].clone())
        for slot, at in zip(some, step.order, strict=True):
            is_chosen = rng.random() < 0.2
            tokens[slot] = step.logits[at, 0].argmax(-1).view(1) if is_chosen else picked.of_row(at)
            found[slot].append(int(tensor_of(tokens[slot])))
    assert found == texts


class Alphabet:
    """In the place of a session: the token after each is the next one; a step may fail."""

    captures, read = False, None

    def __init__(self, rows: int) -> None:
        self.token, self.lengths, self.fails = torch.zeros(rows, dtype=torch.int64), [0] * rows, False

    def begin(self) -> None:
        return

    def launch(self) -> Tensor:
        if self.fails:
            raise ValueError("no memory")
        return self.token[:, None] + 1

    def pick(self) -> None:
        self.token += 1

    def end(self) -> None:
        return


def stepping(rows: int) -> SteppedSession:
    return SteppedSession(cast(ProgramSession, Alphabet(rows)))


def picked_by(session: SteppedSession, *tokens: Token) -> list[PickedToken]:
    _, best = session.step(tokens)
    return [session.picked.of_row(row) for row in range(len(best))]


def numbers(*values: int) -> list[Tensor]:
    return [torch.tensor([value]) for value in values]


def test_a_step_takes_tokens_from_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, session = Brought(monkeypatch), stepping(2)
    tokens = picked_by(session, *numbers(10, 20))
    assert [int(tensor_of(token)) for token in tokens] == [11, 21]
    newer = picked_by(session, *tokens)
    assert [int(tensor_of(token)) for token in newer] == [12, 22]
    assert (counted.steps, counted.brought) == (2, 1)
    with pytest.raises(RuntimeError, match="a step has taken"):
        tensor_of(tokens[0])
    with pytest.raises(RuntimeError, match="a step has taken"):
        session.step(tokens)


def test_another_order_and_other_sessions_tokens_are_brought() -> None:
    session, other = stepping(2), stepping(2)
    one, two = picked_by(session, *numbers(10, 20))
    two, one = picked_by(session, two, one)
    assert [int(tensor_of(token)) for token in (one, two)] == [12, 22]
    one, two = picked_by(other, one, two)
    assert [int(tensor_of(token)) for token in (one, two)] == [13, 23]
    one, again = picked_by(other, one, one)
    assert [int(tensor_of(token)) for token in (one, again)] == [14, 14]
    assert int(tensor_of(two)) == 23


def test_a_token_outlives_steps_of_others() -> None:
    session, alone_ = stepping(2), stepping(1)
    one, two = picked_by(session, *numbers(10, 20))
    picked_by(session, one, *numbers(30))
    assert int(tensor_of(two)) == 21
    picked_by(session, *numbers(40, 50))
    assert int(tensor_of(two)) == 21
    (two,) = picked_by(alone_, two)
    picked_by(session, two, *numbers(60))
    assert int(tensor_of(two)) == 22


def test_after_a_step_that_failed_nothing_lies_there() -> None:
    session = stepping(2)
    fake = session.session
    assert isinstance(fake, Alphabet)
    for given in (0, 1, 2):  # so many of the rows stay as they are
        one, two = picked_by(session, *numbers(10, 20))
        fake.fails = True
        with pytest.raises(ValueError, match="no memory"):
            session.step([*[one, two][:given], *numbers(40, 50)[given:]])
        fake.fails = False
        if given < 2:  # a copy is left of both
            assert [int(tensor_of(token)) for token in picked_by(session, one, two)] == [12, 22]
        else:
            with pytest.raises(RuntimeError, match="a step has taken"):
                session.step([one, two])
        assert [int(tensor_of(token)) for token in picked_by(session, *numbers(70, 80))] == [71, 81]
