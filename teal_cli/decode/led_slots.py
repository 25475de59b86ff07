"""Slots of several ranks: the first one decides, and the others do the same with their shards.

Before the first rank does anything with its slots that the others must do too, it says so in a message of whole
numbers. Tokens are those that it has chosen: each step begins with a copy of them. So it alone needs requests, samplers
and grammars, and all ranks have the same sequences in the same places.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from teal_cli.decode.slots import Chosen, Row, Slots
from teal_cli.ranks.environment import LOST
from teal_cli.ranks.group import RanksApartError, ranks_of
from teal_cli.ranks.messages import Messages
from teal_cli.sparse import SparsityCounter

_SILENCES = 4
"""In the time that ranks wait for one another the first one says something so many times, where there is nothing."""


class _Order(IntEnum):
    WAIT = 0
    BEGIN = 1
    PROMPT = 2
    STEP = 3
    END = 4
    COUNT = 5
    STOP = 6


class LedSlots(Slots):
    """Of the first rank: its own, and the messages that have the others do as they do.

    Args:
        own: with the shard of this rank.
        messages: to the others.
        counter: of what the shards skip.
    """

    def __init__(self, own: Slots, messages: Messages, counter: SparsityCounter) -> None:
        self._own, self._messages, self._counter = own, messages, counter
        self.count, self.positions, self.levels, self.at_once = own.count, own.positions, own.levels, own.at_once
        self.longest_silence = messages.ranks.timeout / _SILENCES
        counter.before_totals = lambda: self._say(_Order.COUNT)
        self._apart = False

    def _say(self, *numbers: int, more: Sequence[int] = ()) -> None:
        with self._together():
            self._messages.say(*numbers, more=more)

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Of what is raised inside the other ranks do not know: then nothing more is said.

        Raises:
            RanksApartError: in the place of any error, and from then on.
        """
        if self._apart:
            raise RanksApartError(LOST)
        try:
            yield
        except Exception as error:
            self._apart = True
            raise error if isinstance(error, RanksApartError) else RanksApartError(str(error)) from error

    def prepare(self, levels: Sequence[float]) -> None:
        """As `Slots.prepare`: the others are not told, and do it by themselves."""
        self._own.prepare(levels)

    def choose_slot(self, free: Sequence[int], prompt: Sequence[int]) -> int:
        """As `Slots.choose_slot`."""
        return self._own.choose_slot(free, prompt)

    def source_of(self, slot: int, prompt: Sequence[int]) -> tuple[int, int]:
        """As `Slots.source_of`."""
        return self._own.source_of(slot, prompt)

    def take(self, slot: int, prompt: Sequence[int], source: int, known: int) -> None:
        """As `Slots.take`."""
        with self._together():
            self._messages.say(_Order.BEGIN, slot, source, known, len(prompt), more=prompt)
            self._own.take(slot, prompt, source, known)

    def run_prompt(self, slot: int, prompt: Sequence[int], done: int) -> tuple[int, Tensor | None]:
        """As `Slots.run_prompt`."""
        with self._together():
            self._messages.say(_Order.PROMPT, slot, done)
            return self._own.run_prompt(slot, prompt, done)

    def step(self, rows: Sequence[Row]) -> Chosen:
        """As `Slots.step`."""
        levels = [self.levels.all.index(row.level) for row in rows]
        numbers = [number for row, level in zip(rows, levels, strict=True) for number in (row.slot, level)]
        with self._together():
            self._messages.say(_Order.STEP, int(self._counter.active), len(rows), *numbers)
            self._messages.ranks.copy_of_first_(torch.cat([row.tokens for row in rows]))
            return self._own.step(rows)

    def length(self, slot: int) -> int:
        """As `Slots.length`."""
        return self._own.length(slot)

    def add(self, slot: int, token: int) -> None:
        """As `Slots.add`: of what comes of it the others are told."""
        self._own.add(slot, token)

    def end(self, slot: int) -> None:
        """As `Slots.end`. Where the ranks are apart, whatever comes next says so: who waits is told before."""
        with suppress(RanksApartError):
            self._say(_Order.END, slot)
        self._own.end(slot)

    def use(self) -> tuple[int, int]:
        """As `Slots.use`."""
        return self._own.use()

    def keep_others_waiting(self) -> None:
        """As `Slots.keep_others_waiting`."""
        self._say(_Order.WAIT)

    def close(self) -> None:
        """As `Slots.close`."""
        self._say(_Order.STOP)


def led(own: Slots, model: Any, counter: SparsityCounter) -> tuple[Slots, Messages | None]:
    """The slots of a rank as a scheduler uses them, and the messages between ranks; of a model of one process its own.

    Args:
        own: with the model, or with the shard of this rank.
        model: whose ranks they are.
        counter: of what is skipped.
    """
    ranks = ranks_of(model)
    if ranks is None:
        return own, None
    messages = Messages(ranks)
    return LedSlots(own, messages, counter) if ranks.rank == 0 else own, messages


def follow(own: Slots, messages: Messages | None, counter: SparsityCounter) -> None:
    """Do with this rank's slots what the first one does with its own, until it stops.

    Args:
        own: with the shard of this rank.
        messages: from the first rank.
        counter: of what the shard skips, which counts already.

    Raises:
        TypeError: one process decodes.
        MachineError: another rank has ended or hangs.
    """
    if messages is None:
        raise TypeError("there is nobody to follow")
    ranks, prompts = messages.ranks, [list[int]() for _ in range(own.count)]
    while True:
        order, *numbers = messages.hear()
        if order == _Order.STOP:
            return
        if order == _Order.BEGIN:
            slot, source, known, length = numbers[:4]
            prompts[slot] = messages.hear_more(length)
            own.take(slot, prompts[slot], source, known)
        elif order == _Order.PROMPT:
            slot, done = numbers[:2]
            own.run_prompt(slot, prompts[slot], done)
        elif order == _Order.STEP:
            active, count = numbers[:2]
            counter.active = bool(active)
            tokens = torch.zeros(count, dtype=torch.int64, device=ranks.device)
            ranks.copy_of_first_(tokens)
            of_rows = zip(numbers[2::2], numbers[3::2], tokens.split(1), strict=False)
            own.step([Row(slot, own.levels.all[level], token) for slot, level, token in of_rows])
        elif order == _Order.END:
            own.end(numbers[0])
        elif order == _Order.COUNT:
            counter.counts()
