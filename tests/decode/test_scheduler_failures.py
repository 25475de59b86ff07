"""What a scheduler says and keeps when something fails that is no request's fault."""

from collections.abc import Sequence

import pytest
import torch
from native_models import NO_LIBRARY
from test_scheduler import Heard, run, sparse_engine

from teal_cli.decode.paths.native_session import NativeSession
from teal_cli.decode.requests import QueueFullError, Request
from teal_cli.decode.scheduler import Scheduler
from teal_cli.errors import TealError
from teal_cli.ranks.group import RanksApartError


def _broken() -> None:
    raise ZeroDivisionError("broken")


def test_a_loop_that_dies_tells_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler(sparse_engine("general"), slots=1, positions=64)
    heard = [Heard(), Heard()]
    for own in heard:  # one runs, one waits
        scheduler.submit(Request((5, 6, 7), 40), own.emitted.append)
    read, reads = scheduler._read, []

    def fail_later() -> None:
        read()
        reads.append(1)
        if len(reads) == 6:
            _broken()

    monkeypatch.setattr(scheduler, "_read", fail_later)
    with pytest.raises(ZeroDivisionError):
        scheduler.run()
    assert [own.finish for own in heard] == ["error", "error"]
    assert heard[0].tokens
    assert not heard[1].tokens
    assert {own.emitted[-1].error for own in heard} == {"ZeroDivisionError: broken"}
    statistics = scheduler.statistics()
    assert (statistics.running, statistics.queued, statistics.finished) == (0, 0, {"error": 2})
    with pytest.raises(QueueFullError):
        scheduler.submit(Request((5, 6, 7), 4), heard[0].emitted.append)


def test_a_request_that_gets_no_slot_is_told_and_the_others_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler(sparse_engine("general"), slots=2, positions=64)
    choose, ended = scheduler.slots.choose_slot, []
    end = scheduler.slots.end

    def fail_once(free: Sequence[int], prompt: Sequence[int]) -> int:
        if prompt[0] == 9:
            _broken()
        return choose(free, prompt)

    monkeypatch.setattr(scheduler.slots, "choose_slot", fail_once)
    monkeypatch.setattr(scheduler.slots, "end", lambda slot: ended.append(slot) or end(slot))
    heard = run(scheduler, [Request((first, 6, 7), 8) for first in (5, 9, 5)])
    assert [own.finish for own in heard] == ["length", "error", "length"]
    assert heard[1].emitted[-1].error == "ZeroDivisionError: broken"
    assert heard[0].tokens == heard[2].tokens
    assert -1 not in ended  # which is another's: the last one
    statistics = scheduler.statistics()
    assert (statistics.running, statistics.queued, statistics.finished) == (0, 0, {"length": 2, "error": 1})


def test_a_loop_that_dies_while_it_looks_for_a_slot_tells_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler(sparse_engine("general"), slots=1, positions=64)

    def apart(free: Sequence[int], prompt: Sequence[int]) -> int:
        raise RanksApartError("a rank is gone")

    monkeypatch.setattr(scheduler.slots, "choose_slot", apart)
    heard = [Heard(), Heard()]
    for own in heard:
        scheduler.submit(Request((5, 6, 7), 4), own.emitted.append)
    with pytest.raises(RanksApartError):
        scheduler.run()
    assert [own.finish for own in heard] == ["error", "error"]


def test_an_end_is_told_though_counts_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler(sparse_engine("general"), slots=1, positions=64)
    own = Heard()

    def leave(emitted) -> None:
        own.emitted.append(emitted)
        if len(own.tokens) == 3:
            monkeypatch.setattr(scheduler._counter, "counts", _broken)
            monkeypatch.setattr(scheduler._counter, "model_wide", lambda: None)
            scheduler.cancel(ticket, "stop")

    ticket = scheduler.submit(Request((5, 6, 7), 40), leave)
    scheduler.stop()
    scheduler.run()
    assert own.finish == "stop"
    assert scheduler.statistics().finished == {"stop": 1}


@pytest.mark.skipif(NO_LIBRARY is not None, reason=str(NO_LIBRARY))
def test_a_session_that_failed_is_counted_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler(sparse_engine("native"), slots=1, positions=64)
    launch, steps = NativeSession.launch, []

    def fail_twice(session: NativeSession) -> torch.Tensor:
        steps.append(session.enabled)  # passes over prompts skip nothing
        if session.enabled and sum(steps) in (1, 4):
            raise TealError("no memory")
        return launch(session)

    monkeypatch.setattr(NativeSession, "launch", fail_twice)
    heard = run(scheduler, [Request((5, 6, 7), 8) for _ in range(3)])
    assert [own.finish for own in heard] == ["error", "error", "length"]
    assert len(scheduler._counter._sources) == 1
    realised = heard[2].emitted[-1].usage.realised_sparsity
    assert realised is not None
    assert 0 < realised < 1
    (name, (_, seen, _)), *_ = scheduler._counter.counts().projections.items()
    ended = 2 + 7  # steps that came to their end
    assert seen == ended * scheduler.engine.model.get_submodule(name).in_features


@pytest.mark.parametrize("dies", [False, True])
def test_whoever_passes_on_what_is_said_is_told_once_for_a_step(dies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And after the last word, also of a loop that dies; whatever somebody else's reply did."""
    scheduler = Scheduler(sparse_engine("general"), slots=4, positions=64)
    waiting, passed_on = list[int](), list[int]()

    def pass_on() -> None:
        if waiting:
            passed_on.append(len(waiting))
            waiting.clear()

    scheduler.on_said = pass_on
    for number in range(4):
        scheduler.submit(Request((5, 6, number), 9), lambda emitted: waiting.append(1))
    if dies:
        step, steps = scheduler._step, []

        def fail_later(replies) -> None:
            steps.append(1)
            step(replies) if len(steps) < 6 else monkeypatch.setattr(scheduler, "_admit", _broken)

        monkeypatch.setattr(scheduler, "_step", fail_later)
        with pytest.raises(ZeroDivisionError):
            scheduler.run()
    else:
        scheduler.stop()
        scheduler.run()
        assert sum(passed_on) == 4 * 9
    assert not waiting
    assert passed_on[0] == 1  # a first token does not wait for the step that is next
    assert max(passed_on) == 4
