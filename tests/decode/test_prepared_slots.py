"""Slots whose first steps were taken before there were sequences."""

from contextlib import nullcontext

import pytest
from drafting import speculator
from fused_pair import half_plan
from native_models import NO_LIBRARY
from test_scheduler import alone, run
from test_stepped_rows import engine_on

from teal_cli.decode import shared_slots
from teal_cli.decode.paths.program import ProgramPath
from teal_cli.decode.paths.program_session import ProgramSession
from teal_cli.decode.requests import Request
from teal_cli.decode.scheduler import Scheduler
from teal_cli.decode.shared_slots import SharedSlots

needs_library = pytest.mark.skipif(NO_LIBRARY is not None, reason=str(NO_LIBRARY))


@pytest.mark.parametrize("path", [pytest.param("native", marks=needs_library), "fused"])
def test_requests_find_every_session_and_nothing_of_the_steps_before(
    path: str, own_tables: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts, what was kept and what was skipped are as without; a prompt may begin as that of the first steps did."""
    engine = engine_on(path, monkeypatch)
    requests = [Request((0, 6, 7), 5), Request((0,), 3, sparsity=0.0)]
    plain = run(Scheduler(engine, slots=2, positions=16), requests)
    scheduler = Scheduler(engine, slots=2, positions=16)
    assert isinstance(scheduler.slots, SharedSlots)
    empty = scheduler.statistics()
    scheduler.slots.prepare([0.0, scheduler.levels.default])
    assert scheduler.statistics() == empty
    monkeypatch.setattr(ProgramPath, "open_rows", None)  # every session is there
    heard = run(scheduler, requests)
    for own, without in zip(heard, plain, strict=True):
        assert own.tokens == without.tokens
        assert own.emitted[-1].usage == without.emitted[-1].usage


@needs_library
@pytest.mark.parametrize("kind", [None, "sparse", "lookup+int8"])
def test_every_session_is_compiled_before(kind: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of all levels and of passes over drafted tokens too, where a path has kernels to compile."""
    engine = engine_on("native", monkeypatch)
    compiled: list[ProgramSession] = []
    monkeypatch.setattr(ProgramSession, "compile", lambda self: compiled.append(self))
    monkeypatch.setattr(ProgramPath, "compiles", True)
    monkeypatch.setattr(shared_slots, "compiling", nullcontext)
    plans = {0.5: half_plan(engine.model), 0.7: half_plan(engine.model, 1.5)}
    drafts = None if kind is None else speculator(engine, kind, 3)
    scheduler = Scheduler(engine, slots=3, positions=32, levels=plans, speculator=drafts)
    scheduler.slots.prepare([])
    assert isinstance(scheduler.slots, SharedSlots)
    assert compiled == [stepped.session for stepped in scheduler.slots._sessions.values()]
    spans = {key.span for key in scheduler.slots._sessions}
    assert spans == ({1} if kind is None else {1, 2, 4})  # a step is over what is drafted, and one before it
    monkeypatch.setattr(ProgramPath, "open_rows", None)
    requests = [Request((5, 6, 7), 8, sparsity=(0.0, 0.5, 0.7)[index % 3]) for index in range(9)]
    heard = run(scheduler, requests + [Request((5, 6, 7, 5, 6), 12, sparsity=0.0)] * 3)
    assert [own.finish for own in heard] == ["length"] * 12
    assert (scheduler.statistics().drafted_tokens or 0) > 0 or kind is None


@needs_library
def test_rows_that_are_stepped_one_by_one_are_prepared_each(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_on("native", monkeypatch)
    requests = [Request((5, 6, 7), 5), Request((9, 8), 5)]
    texts = [alone(engine, request) for request in requests]
    scheduler = Scheduler(engine, slots=2, positions=16, together=False)
    scheduler.slots.prepare([scheduler.levels.default])
    monkeypatch.setattr(ProgramPath, "open_rows", None)
    assert [own.tokens for own in run(scheduler, requests)] == texts


def test_other_slots_have_nothing_to_prepare(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_on("general", monkeypatch)
    scheduler = Scheduler(engine, slots=2, positions=16)
    scheduler.slots.prepare([scheduler.levels.default])
    request = Request((5, 6, 7), 5)
    assert [own.tokens for own in run(scheduler, [request])] == [alone(engine, request)]
