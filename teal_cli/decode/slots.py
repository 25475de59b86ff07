"""Slots: where the sequences of a scheduler keep their state, and how they take steps together.

Here is what all kinds of slots offer, and the plainest kind: each slot has a cache of its own, of any decode path, and
rows are stepped one after the other.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from teal_cli.decode.engine import Engine
from teal_cli.decode.levels import DENSE, Levels
from teal_cli.decode.paths.base import Path, Session, Stepper
from teal_cli.decode.picked import Picked, Token, tensor_of
from teal_cli.speculation import MOST_DRAFTED


@dataclass
class Row:
    """A sequence in a slot."""

    slot: int
    level: float
    """Of sparsity: one of `Levels.all`."""
    given: Token
    """The next step's input: the last token, and those drafted behind it."""

    @property
    def tokens(self) -> Tensor:
        """(span,) int64 on the device: what is given, to be read before any other step."""
        return tensor_of(self.given)


@dataclass(frozen=True)
class Chosen:
    """What a step gave. The next one may overwrite all of it."""

    logits: Tensor
    """(rows, span, vocabulary), in an order of their own."""
    best: Tensor
    """(rows, span) int64: where they are largest."""
    order: list[int]
    """Of each row that was asked for, where it stands in them."""
    picked: Picked | None = None
    """`best` of one token a row, for the next step to take; None where no session has it."""
    read: Tensor | None = None
    """(rows, 2) int64: `best` of one token a row, and 1 where its logits are numbers; None where the step has not
    computed that."""


@dataclass(frozen=True)
class Drafting:
    """What drafts tokens of dense sequences, which are then run in one step and may be taken back."""

    path: Path | None
    """Of the model that drafts, the engine's own or one like it: it writes into the same caches, and the step that
    verifies overwrites that. None where no model does."""
    level: float
    """Of its sparsity."""
    most: int = MOST_DRAFTED
    """Tokens that are drafted for one step."""


class Slots(ABC):
    """A fixed number of slots. One thread may use them.

    A sequence is begun, its prompt is run in one call or in several, then steps are taken of all that have one. Those
    that are dense may take several tokens in a step, and be cut to what is kept of them.
    """

    count: int
    positions: int
    """Of each slot."""
    levels: Levels
    at_once: int
    """Sequences that decode at the same time, at most."""
    longest_silence: float | None = None
    """Seconds after which `keep_others_waiting` is to be called where there is nothing to do; None for never."""

    def prepare(self, levels: Sequence[float]) -> None:
        """Take first steps of each number of sequences, each of them at each of these levels, before there are any.

        On a GPU kernels are compiled and steps captured by that, for which somebody would wait later. Several ranks do
        it at the same time.
        """
        return

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
        """The tokens of each: as many of all, and more than one only of dense rows.

        Raises:
            ArtefactError: a slot is full.
        """

    def draft(self, rows: Sequence[Row]) -> Chosen:
        """One token of each, by the model that drafts, at its own level.

        Raises:
            TypeError: none drafts.
        """
        raise TypeError("nothing drafts")

    def spans(self, sequences: int) -> tuple[int, ...]:
        """Tokens of each of so many sequences that a step may take, from 1 on up; more would not pay."""
        return (1,)

    @abstractmethod
    def length(self, slot: int) -> int:
        """Positions that a sequence has."""

    def cut(self, slot: int, length: int) -> None:
        """Forget what lies behind so many positions of a sequence, which was drafted.

        Raises:
            TypeError: nothing drafts.
        """
        raise TypeError("nothing drafts")

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

    Args:
        engine: whose path decodes.
        count: slots.
        positions: of each.
        levels: of sparsity.
        drafting: what takes tokens back, if anything does.
    """

    def __init__(
        self, engine: Engine, count: int, positions: int, levels: Levels, *, drafting: Drafting | None = None
    ) -> None:
        self.count, self.positions, self.levels = count, positions, levels
        self._engine, self._path = engine, engine.path
        self._new_cache = engine.path.new_cache if drafting is None else engine.path.new_cache_for_steppers
        self._draft_path = engine.path if drafting is None or drafting.path is None else drafting.path
        self._draft_level = DENSE if drafting is None else drafting.level
        self.at_once = 1 if hasattr(engine.model, "_setup_cache") else count
        self._caches: list[Any] = [None] * count
        self._sessions: list[Session | None] = [None] * count
        self._steppers: dict[tuple[int, bool], Stepper] = {}
        """Of a slot: of the model that verifies, or (True) of the one that drafts."""
        self._lengths = [0] * count

    def source_of(self, slot: int, prompt: Sequence[int]) -> tuple[int, int]:
        """As `Slots.source_of`: nothing is kept."""
        return slot, 0

    def take(self, slot: int, prompt: Sequence[int], source: int, known: int) -> None:
        """As `Slots.take`."""
        self.end(slot)
        self._caches[slot] = self._new_cache(self.positions)

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
        own = self._path.own_kernels
        for row in rows:
            # A counter would keep each session that it has counted.
            with self.levels.using(row.level), self._uncounted() if own else nullcontext():
                if len(row.tokens) == 1:
                    several.append(self._session(row).step(row.tokens.view(1, 1)).clone()[:, None])
                else:
                    several.append(self._run(row, is_draft=False))
            self._lengths[row.slot] += len(row.tokens)
        return _chosen(several)

    @torch.no_grad()
    def draft(self, rows: Sequence[Row]) -> Chosen:
        """As `Slots.draft`."""
        several: list[Tensor] = []
        for row in rows:
            with self._uncounted():
                several.append(self._run(row, is_draft=True))
            self._lengths[row.slot] += 1
        return _chosen(several)

    def spans(self, sequences: int) -> tuple[int, ...]:
        """As `Slots.spans`: each row is stepped by itself."""
        return Stepper.spans

    def length(self, slot: int) -> int:
        """As `Slots.length`."""
        return self._lengths[slot]

    def cut(self, slot: int, length: int) -> None:
        """As `Slots.cut`."""
        if self._caches[slot] is not None:
            self._caches[slot].truncate(length)
            self._lengths[slot] = length

    def _run(self, row: Row, *, is_draft: bool) -> Tensor:
        """(1, span, vocabulary) logits of a pass over several tokens, or of a draft."""
        path, level = (self._draft_path, self._draft_level) if is_draft else (self._path, row.level)
        key = row.slot, is_draft
        if key not in self._steppers:
            self._steppers[key] = path.stepper(self._caches[row.slot], sparse=level != DENSE)
        with self.levels.using(level):
            logits, _ = self._steppers[key].run(row.tokens[None], [self._lengths[row.slot]])
        return logits.clone()

    def _uncounted(self) -> AbstractContextManager[None]:
        return self._engine.control.uncounted() if self._engine.control else nullcontext()

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
        for is_draft in (False, True):
            self._steppers.pop((slot, is_draft), None)
        self._lengths[slot] = 0

    def use(self) -> tuple[int, int]:
        """As `Slots.use`."""
        return sum(self._lengths), 0


def _chosen(several: Sequence[Tensor]) -> Chosen:
    logits = torch.cat(list(several))
    return Chosen(logits, logits.argmax(-1), list(range(len(several))))
