"""Slots: where the sequences of a scheduler keep their state, and how they take steps together.

Here is what all kinds of slots offer, and the plainest kind: each slot has a cache of its own, of any decode path, and
rows are stepped one after the other.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from teal_cli.decode.engine import Engine
from teal_cli.decode.levels import Levels
from teal_cli.decode.paths.base import Session


@dataclass
class Row:
    """A sequence in a slot."""

    slot: int
    level: float
    """Of sparsity: one of `Levels.all`."""
    token: Tensor
    """(1,) int64 on the device: the next step's input."""


@dataclass(frozen=True)
class Chosen:
    """What a step gave. The next one may overwrite all of it."""

    logits: Tensor
    """(rows, vocabulary), in an order of their own."""
    best: Tensor
    """(rows,) int64: where they are largest."""
    order: list[int]
    """Of each row that was asked for, where it stands in them."""


class Slots(ABC):
    """A fixed number of slots. One thread may use them.

    A sequence is begun, its prompt is run in one call or in several, then steps are taken of all that have one.
    """

    count: int
    positions: int
    """Of each slot."""
    levels: Levels
    at_once: int
    """Sequences that decode at the same time, at most."""
    longest_silence: float | None = None
    """Seconds after which `keep_others_waiting` is to be called where there is nothing to do; None for never."""

    def begin(self, slot: int, prompt: Sequence[int]) -> int:
        """Give a slot to a sequence: how many of the prompt's first tokens it has already, fewer than all."""
        source, known = self.source_of(slot, prompt)
        self.take(slot, prompt, source, known)
        return known

    @abstractmethod
    def source_of(self, slot: int, prompt: Sequence[int]) -> tuple[int, int]:
        """The slot that has the most of a prompt, and how many tokens of it."""

    @abstractmethod
    def take(self, slot: int, prompt: Sequence[int], source: int, known: int) -> None:
        """Give a slot to a sequence, and the first tokens of its prompt from another slot, as `source_of` says."""

    @abstractmethod
    def run_prompt(self, slot: int, prompt: Sequence[int], done: int) -> tuple[int, Tensor | None]:
        """Run a piece of a prompt densely, of which so many tokens were run before.

        Returns:
            How many are run now, and after the last one its (1, vocabulary) logits.
        """

    @abstractmethod
    def step(self, rows: Sequence[Row]) -> Chosen:
        """One token of each.

        Raises:
            ArtefactError: a slot is full.
        """

    @abstractmethod
    def add(self, slot: int, token: int) -> None:
        """A token of the sequence, which the next step reads or has read."""

    @abstractmethod
    def end(self, slot: int) -> None:
        """The sequence is over. What it leaves may be kept for one that begins like it."""

    @abstractmethod
    def use(self) -> tuple[int, int]:
        """Positions that sequences take, and those that are kept of others."""

    def keep_others_waiting(self) -> None:
        """Tell other ranks, where there are some, that there is nothing to do."""
        return

    def close(self) -> None:
        """No sequence comes any more."""
        return

    def choose_slot(self, free: Sequence[int], prompt: Sequence[int]) -> int:
        """The slot, of some that are free, for a prompt."""
        return free[0]


class SeparateSlots(Slots):
    """A cache for each slot, and a session on it: any model that decodes at all.

    Rows are stepped one after the other, so that each gives the bits that it gives alone. A model whose layers hold
    their state (RecurrentGemma) has one slot.
    """

    def __init__(self, engine: Engine, count: int, positions: int, levels: Levels) -> None:
        self.count, self.positions, self.levels = count, positions, levels
        self._engine, self._path = engine, engine.path
        self.at_once = 1 if hasattr(engine.model, "_setup_cache") else count
        self._caches: list[Any] = [None] * count
        self._sessions: list[Session | None] = [None] * count
        self._lengths = [0] * count

    def source_of(self, slot: int, prompt: Sequence[int]) -> tuple[int, int]:
        """As `Slots.source_of`: nothing is kept."""
        return slot, 0

    def take(self, slot: int, prompt: Sequence[int], source: int, known: int) -> None:
        """As `Slots.take`."""
        self.end(slot)
        self._caches[slot] = self._path.new_cache(self.positions)

    @torch.no_grad()
    def run_prompt(self, slot: int, prompt: Sequence[int], done: int) -> tuple[int, Tensor | None]:
        """As `Slots.run_prompt`: all of it."""
        ids = torch.tensor([prompt[done:]], dtype=torch.int64, device=self._engine.device)
        logits = self._engine.prefill(ids, self._caches[slot])
        self._lengths[slot] = len(prompt)
        return len(prompt), logits

    @torch.no_grad()
    def step(self, rows: Sequence[Row]) -> Chosen:
        """As `Slots.step`."""
        several: list[Tensor] = []
        control, own = self._engine.control, self._path.own_kernels
        for row in rows:
            # A counter would keep each session that it has counted.
            with self.levels.using(row.level), control.uncounted() if control and own else nullcontext():
                session = self._session(row)
                several.append(session.step(row.token.view(1, 1)).clone())
            self._lengths[row.slot] += 1
        logits = torch.cat(several)
        return Chosen(logits, logits.argmax(-1), list(range(len(rows))))

    def add(self, slot: int, token: int) -> None:
        """As `Slots.add`: nothing is kept of it."""

    def _session(self, row: Row) -> Session:
        session = self._sessions[row.slot]
        if session is None or session.stale:
            session = self._sessions[row.slot] = self._path.open(self._caches[row.slot])
        return session

    def end(self, slot: int) -> None:
        """As `Slots.end`."""
        self._caches[slot] = self._sessions[slot] = None
        self._lengths[slot] = 0

    def use(self) -> tuple[int, int]:
        """As `Slots.use`."""
        return sum(self._lengths), 0
