"""What the first rank says of its slots, and what another one does when it hears that: in one process."""

from collections import deque
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from teal_cli.decode.led_slots import LedSlots, follow
from teal_cli.decode.slots import Chosen, Row, Slots
from teal_cli.errors import MachineError
from teal_cli.ranks.group import Ranks, RanksApartError
from teal_cli.sparse import SparsityCounter


class Said:
    """In the place of `Messages`: what was said is there to be heard."""

    def __init__(self) -> None:
        self.ranks: Any = self
        self.timeout, self.device = 8.0, torch.device("cpu")
        self.numbers, self.tokens = deque[list[int]](), deque[Tensor]()

    def say(self, *numbers: int, more: Sequence[int] = ()) -> None:
        self.numbers.append([*numbers, *[0] * (32 - len(numbers))])
        if more:
            self.numbers.append(list(more))

    def hear(self) -> list[int]:
        return self.numbers.popleft()

    def hear_more(self, count: int) -> list[int]:
        found = self.numbers.popleft()
        assert len(found) == count
        return found

    def copy_of_first_(self, x: Tensor) -> None:
        if x.any():
            self.tokens.append(x.clone())
        else:
            x.copy_(self.tokens.popleft())


class Levels:
    all = (0.0, 0.5)


class Noted(Slots):
    """Slots that note what is done with them."""

    def __init__(self) -> None:
        self.count, self.positions, self.at_once = 3, 64, 3
        self.levels = Levels()  # type: ignore[assignment]
        self.done: list[tuple[Any, ...]] = []
        self.fails = False

    def source_of(self, slot: int, prompt: Sequence[int]) -> tuple[int, int]:
        return 2, 1

    def take(self, slot: int, prompt: Sequence[int], source: int, known: int) -> None:
        self.done.append(("take", slot, tuple(prompt), source, known))

    def run_prompt(self, slot: int, prompt: Sequence[int], done: int) -> tuple[int, Tensor | None]:
        self.done.append(("prompt", slot, tuple(prompt), done))
        return len(prompt), torch.zeros(1, 5)

    def step(self, rows: Sequence[Row]) -> Chosen:
        if self.fails:
            raise ValueError("full")
        self.done.append(("step", [(row.slot, row.level, row.tokens.tolist()) for row in rows]))
        return Chosen(torch.zeros(len(rows), 5), torch.zeros(len(rows), dtype=torch.int64), list(range(len(rows))))

    def length(self, slot: int) -> int:
        return 0

    def add(self, slot: int, token: int) -> None:
        raise NotImplementedError

    def end(self, slot: int) -> None:
        self.done.append(("end", slot))

    def use(self) -> tuple[int, int]:
        return 0, 0


def rows() -> list[Row]:
    return [Row(1, 0.5, torch.tensor([7])), Row(0, 0.0, torch.tensor([3]))]


def test_another_rank_does_what_the_first_one_does() -> None:
    said, ours, others = Said(), Noted(), Noted()
    counter, its_counter = SparsityCounter(), SparsityCounter()
    led = LedSlots(ours, said, counter)  # type: ignore[arg-type]
    assert led.longest_silence == 2.0
    assert led.begin(1, (9, 8, 7)) == 1
    led.run_prompt(1, (9, 8, 7), 1)
    led.keep_others_waiting()
    counter.active = False
    led.step(rows())
    led.end(1)
    led.close()
    follow(others, said, its_counter)  # type: ignore[arg-type]
    assert others.done == ours.done
    assert others.done[2] == ("step", [(1, 0.5, [7]), (0, 0.0, [3])])
    assert not its_counter.active
    assert not said.numbers


def test_counts_are_asked_of_all() -> None:
    said, counter = Said(), SparsityCounter()
    led = LedSlots(Noted(), said, counter)  # type: ignore[arg-type]
    counter.ranks = TwoAlike(0, 2, torch.device("cpu"))
    counter.whole = {"layer": 100}
    counter.add("layer", 50, 10, 4)
    assert counter.model_wide() == 0.4
    led.close()
    asked: list[int] = []
    its_counter = SparsityCounter()
    its_counter.counts = lambda: asked.append(1)  # type: ignore[method-assign,assignment,return-value]
    follow(Noted(), said, its_counter)  # type: ignore[arg-type]
    assert asked == [1]


class TwoAlike(Ranks):
    """Two ranks, of which the other has the same numbers."""

    def totals(self, numbers: list[int]) -> list[int]:
        return [2 * number for number in numbers]


def test_ranks_that_are_apart_do_nothing_more() -> None:
    said, own = Said(), Noted()
    led = LedSlots(own, said, SparsityCounter())  # type: ignore[arg-type]
    own.fails = True
    with pytest.raises(RanksApartError, match="full"):
        led.step(rows())
    own.fails, spoken = False, len(said.numbers)
    with pytest.raises(MachineError, match="has ended or hangs"):
        led.step(rows())
    led.end(1)  # for those who wait to be told
    assert len(said.numbers) == spoken
