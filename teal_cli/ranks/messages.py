"""What the first rank tells the others while they serve: a few whole numbers, on the host, whatever device decodes."""

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from teal_cli.ranks.group import Ranks, lost

_SIZE = 64
"""Numbers of a message: every one has as many, so that nobody need be told how many come."""


class Messages:
    """From the first rank to all others, in the order in which it says them. All ranks make it at the same time.

    Who waits sleeps, and gives up after as long as ranks wait for one another: the first one must say something before.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        with lost():
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=ranks.timeout))

    def say(self, *numbers: int, more: Sequence[int] = ()) -> None:
        """Tell the others. What is `more` than fits they must ask for, knowing how much there is.

        Raises:
            MachineError: another rank has ended or hangs.
            ValueError: too many numbers.
        """
        if len(numbers) > _SIZE:
            raise ValueError(f"{len(numbers)} numbers are more than {_SIZE}")
        self._pass_on(torch.tensor([*numbers, *[0] * (_SIZE - len(numbers))]))
        if more:
            self._pass_on(torch.tensor(more))

    def hear(self) -> list[int]:
        """What the first rank says next, and zeros behind.

        Raises:
            MachineError: another rank has ended, or nothing was said for too long.
        """
        return self.hear_more(_SIZE)

    def hear_more(self, count: int) -> list[int]:
        """The numbers that did not fit into the message before."""
        return self._pass_on(torch.zeros(count, dtype=torch.int64))

    def _pass_on(self, numbers: torch.Tensor) -> list[int]:
        with lost():
            dist.broadcast(numbers, 0, group=self._group)
        found: list[int] = numbers.tolist()
        return found
