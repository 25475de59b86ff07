"""Slots of the paths that execute block programs: all rows that decode are stepped by one session."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise, takewhile
from typing import NamedTuple

import torch
from torch import Tensor

from teal_cli.decode.engine import Engine
from teal_cli.decode.levels import DENSE, Levels
from teal_cli.decode.paths.graphs import SteppedSession
from teal_cli.decode.paths.program import ProgramPath
from teal_cli.decode.prompts import Keep, pieces, reusable
from teal_cli.decode.row_levels import RowLevels
from teal_cli.decode.slot_cache import SlotCache
from teal_cli.decode.slots import Chosen, Drafting, Row, SeparateSlots, Slots
from teal_kernels.launching import compiling

_MOST_ROWS = 8
"""Of a session: as many as one launch, or one call of the library, takes."""
_FIRST_STEPS = 2
"""Of a session on a GPU: one is launched, and the next is captured."""


class _Key(NamedTuple):
    """What a session is of."""

    places: range
    highest: float
    """Of the levels of its rows."""
    span: int
    """Tokens of each row."""
    drafts: bool
    """Whether the model that drafts runs in it."""


class SharedSlots(Slots):
    """One cache of all slots, and for each number of rows a session on its first places.

    A slot is a sequence's for as long as it runs. Its place in the cache changes: those that decode lie in front, so
    that a step costs nothing for slots that are free. When one ends, the last of them takes its place. A session, and
    the graph that was captured of it, is of a number of rows and not of sequences: who comes and goes is data.

    Args:
        engine: whose path executes block programs.
        count: slots.
        positions: of each.
        levels: of sparsity.
        keep: what of ended sequences is used for those that begin alike.
        together: False steps one row after the other.
        drafting: what takes tokens back, if anything does.
    """

    def __init__(
        self,
        engine: Engine,
        count: int,
        positions: int,
        levels: Levels,
        keep: Keep,
        *,
        together: bool = True,
        drafting: Drafting | None = None,
    ) -> None:
        if not isinstance(engine.path, ProgramPath):
            raise TypeError(f"path {engine.path.name} executes no block programs")
        self.count, self.at_once = count, min(count, _MOST_ROWS)
        self.positions, self.levels, self.keep = positions, levels, keep
        self._engine, self._path = engine, engine.path
        self._piece = engine.path.piece_for(positions)
        one = engine.path.new_cache(1)
        engine.prefill(torch.zeros(1, 1, dtype=torch.int64, device=engine.device), one)
        self._cache = SlotCache(one, count, positions)
        self._together = together
        draft_path = engine.path if drafting is None or drafting.path is None else drafting.path
        if not isinstance(draft_path, ProgramPath):
            raise TypeError(f"path {draft_path.name} executes no block programs")
        self._drafting = drafting
        self._draft_path, self._draft_level = draft_path, DENSE if drafting is None else drafting.level
        self._sessions: dict[_Key, SteppedSession] = {}
        self._empty()

    def _empty(self) -> None:
        """No slot has anything."""
        self._place = list(range(self.count))
        """Of each slot."""
        self._tokens: list[list[int]] = [[] for _ in range(self.count)]
        """Of each slot, those whose keys and values it has or has had."""
        self._dense = [0] * self.count
        """Of each slot, how many of them were run as a prompt."""
        self._taken = [False] * self.count
        self._used = [0] * self.count
        """Of each slot, when it was last begun or ended, in begins and ends."""
        self._clock = 0
        self._cache.lengths[:] = [0] * self.count

    @torch.no_grad()
    def prepare(self, levels: Sequence[float]) -> None:
        """As `Slots.prepare`. Passes over drafted tokens, and steps of other levels, are compiled and not captured."""
        if self._path.compiles:
            with compiling():
                for key in self._all_keys():
                    self._session(key).compile()
        slots = range(self.at_once)
        for slot in slots:
            self.begin(slot, [0])
            self.run_prompt(slot, [0], 0)
        token = torch.zeros(1, dtype=torch.int64, device=self._engine.device)
        for count in reversed(range(1, self.at_once + 1)):  # as fewer and fewer are left, no place is exchanged
            for level in levels:
                for _ in range(_FIRST_STEPS):
                    self.step([Row(slot, level, token) for slot in slots[:count]])
                    for slot in slots[:count]:
                        self.cut(slot, 1)
        self._empty()

    def _all_keys(self) -> Iterator[_Key]:
        """Of every session that requests may need."""
        for count in range(1, self.at_once + 1):
            places = range(count) if self._together else range(count - 1, count)
            for level in self.levels.all:
                yield _Key(places, level, 1, drafts=False)
            if self._drafting is not None:
                spans = self.spans(count)
                longer = (span for shorter, span in pairwise(spans) if shorter <= self._drafting.most)
                yield from (_Key(places, DENSE, span, drafts=False) for span in longer)
                if self._drafting.path is not None:
                    yield _Key(places, self._draft_level, 1, drafts=True)

    def choose_slot(self, free: Sequence[int], prompt: Sequence[int]) -> int:
        """The one whose sequence the prompt continues, else the one that ended the longest ago."""
        continued = [slot for slot in free if 0 < len(self._tokens[slot]) <= self._alike(slot, prompt)]
        if continued and self.keep != "nothing":
            return max(continued, key=lambda slot: len(self._tokens[slot]))
        return min(free, key=lambda slot: (self._used[slot], self._place[slot]))

    def _alike(self, slot: int, prompt: Sequence[int]) -> int:
        """With how many tokens a slot's sequence begins like a prompt."""
        pairs = zip(self._tokens[slot], prompt, strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    def _known(self, slot: int, prompt: Sequence[int]) -> int:
        known = self._tokens[slot][: self._cache.lengths[self._place[slot]]]
        return reusable(prompt, known, self._dense[slot], self._piece, self.keep)

    def source_of(self, slot: int, prompt: Sequence[int]) -> tuple[int, int]:
        """As `Slots.source_of`: of several the slot itself."""
        source = max(range(self.count), key=lambda other: (self._known(other, prompt), other == slot))
        return source, self._known(source, prompt)

    def take(self, slot: int, prompt: Sequence[int], source: int, known: int) -> None:
        """As `Slots.take`. What another slot has of the prompt is copied."""
        if source != slot:
            self._cache.copy(self._place[source], self._place[slot], known)
            self._tokens[slot], self._dense[slot] = self._tokens[source], self._dense[source]
        self._cache.lengths[self._place[slot]] = known
        self._clock += 1
        self._used[slot] = self._clock
        self._tokens[slot], self._taken[slot] = list(prompt[:known]), True
        self._dense[slot] = min(self._dense[slot], known)

    def run_prompt(self, slot: int, prompt: Sequence[int], done: int) -> tuple[int, Tensor | None]:
        """As `Slots.run_prompt`: a piece."""
        start, end = next(pieces(done, len(prompt), self._piece))
        ids = torch.tensor([prompt[start:end]], dtype=torch.int64, device=self._engine.device)
        cache = self._cache.some(range(self._place[slot], self._place[slot] + 1))
        logits = self._engine.prefill(ids, cache)
        cache.take_lengths([end])
        self._tokens[slot] += prompt[start:end]
        if self._dense[slot] == start:  # behind a reply that was kept nothing counts as a prompt's
            self._dense[slot] = end
        return end, logits if end == len(prompt) else None

    def step(self, rows: Sequence[Row]) -> Chosen:
        """As `Slots.step`."""
        return self._pass(rows, drafts=False)

    def draft(self, rows: Sequence[Row]) -> Chosen:
        """As `Slots.draft`. It is not counted: what requests skip is."""
        own = [Row(row.slot, self._draft_level, row.given) for row in rows]
        with self._draft_path.control.uncounted():
            return self._pass(own, drafts=True)

    def _pass(self, rows: Sequence[Row], *, drafts: bool) -> Chosen:
        if not self._together:
            places = [self._place[row.slot] for row in rows]
            each = [
                self._stepped(range(place, place + 1), [row], drafts) for place, row in zip(places, rows, strict=True)
            ]
            logits, best = torch.cat([one.logits for one in each]), torch.cat([one.best for one in each])
            return Chosen(logits, best, list(range(len(rows))))
        self._bring_to_front([row.slot for row in rows])
        order = sorted(rows, key=lambda row: self._place[row.slot])
        at = {row.slot: index for index, row in enumerate(order)}
        step = self._stepped(range(len(rows)), order, drafts)
        return replace(step, order=[at[row.slot] for row in rows])

    def _stepped(self, places: range, rows: Sequence[Row], drafts: bool) -> Chosen:
        """Step the sequences of neighbouring places, in their order."""
        span = len(rows[0].tokens)
        key = _Key(places, max(row.level for row in rows), span, drafts)
        session = self._session(key)
        try:
            levels = [self.levels.all.index(row.level) for row in rows for _ in range(span)]
            session.place(self._cache.lengths[places.start : places.stop], levels)
            logits, best = session.step([row.given for row in rows])
        except Exception:
            session.forget()
            del self._sessions[key]  # nobody knows how far it came
            raise
        found = Chosen(logits.view(len(rows), span, -1), best.view(len(rows), span), list(range(len(rows))))
        return replace(found, picked=session.picked, read=session.read) if span == 1 else found

    def spans(self, sequences: int) -> tuple[int, ...]:
        """As `Slots.spans`: as many rows as one call, or one launch, takes."""
        together = sequences if self._together else 1
        return tuple(span for span in self._path.spans_for(together) if span * together <= _MOST_ROWS)

    def length(self, slot: int) -> int:
        """As `Slots.length`."""
        return self._cache.lengths[self._place[slot]]

    def cut(self, slot: int, length: int) -> None:
        """As `Slots.cut`."""
        self._cache.lengths[self._place[slot]] = length

    def add(self, slot: int, token: int) -> None:
        """As `Slots.add`."""
        self._tokens[slot].append(token)

    def _bring_to_front(self, slots: Sequence[int]) -> None:
        """Have the sequences of these slots lie in the first places, moving as few as that takes."""
        inside = {self._place[slot] for slot in slots}
        holes = [place for place in range(len(slots)) if place not in inside]
        for slot in slots:
            if self._place[slot] >= len(slots):
                self._exchange(slot, holes.pop())

    def _exchange(self, slot: int, place: int) -> None:
        other = self._place.index(place)
        self._cache.exchange(self._place[slot], place)
        self._place[slot], self._place[other] = place, self._place[slot]

    def _session(self, key: _Key) -> SteppedSession:
        """For so many rows, tuned for the highest level among them."""
        if key not in self._sessions:
            path = self._draft_path if key.drafts else self._path
            levels = RowLevels(self.levels.rules(), self.levels.all.index(key.highest))
            cache = self._cache.some(key.places)
            session = path.open_rows(cache, levels, sparse=key.highest != DENSE, span=key.span)
            self._sessions[key] = SteppedSession(session)
        return self._sessions[key]

    def end(self, slot: int) -> None:
        """As `Slots.end`: what it has stays, until another takes the slot."""
        self._taken[slot] = False
        self._clock += 1
        self._used[slot] = self._clock

    def use(self) -> tuple[int, int]:
        """As `Slots.use`."""
        lengths = [self._cache.lengths[place] for place in self._place]
        taken = sum(length for length, is_taken in zip(lengths, self._taken, strict=True) if is_taken)
        return taken, sum(lengths) - taken


def slots_of(
    engine: Engine,
    count: int,
    positions: int,
    levels: Levels,
    keep: Keep,
    *,
    together: bool,
    drafting: Drafting | None = None,
) -> Slots:
    """The kind of slots for an engine's path. Arguments as of both kinds."""
    if isinstance(engine.path, ProgramPath) and engine.path.piece_for(positions) is not None:
        return SharedSlots(engine, count, positions, levels, keep, together=together, drafting=drafting)
    return SeparateSlots(engine, count, positions, levels, drafting=drafting)
