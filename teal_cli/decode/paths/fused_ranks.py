"""Sums and gathers over ranks as steps of a session of the fused path.

There are several ways, and the fastest on the machine is taken, measured once: our launch between the GPUs of a host,
torch's one-shot all-reduce on the same memory, and the library of the process group (NCCL, or Gloo on CPUs).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from teal_cli.decode.timing import seconds_of
from teal_cli.ranks.group import Ranks
from teal_cli.ranks.peers import group_name, open_inboxes, peers_reach, shared_memory
from teal_kernels.triton_ranks import Inboxes, gather_ranks, places_of_sum, squares_of_sum, sum_ranks

Step = Callable[[], object]
_MEASURED_SUMS = 64
_ROUNDS = 5


@dataclass(frozen=True)
class Summed:
    """What a sum over ranks is written to."""

    y: Tensor
    """(rows, size)"""
    added: bool = False
    """Whether the sum is added to it."""
    scale: float = 1.0
    squares: Tensor | None = None
    """As `sum_ranks` has them."""


class Sums(ABC):
    """One way, for batches of so many rows: it hands out the memory that products write, and binds sums of it.

    Sessions use it one after the other, each from `begin` on.

    Args:
        ranks: of the group.
        rows: of the batch.
        pdl: launch while the kernel before still runs.
    """

    name: str

    def __init__(self, ranks: Ranks, rows: int, pdl: bool) -> None:
        self.ranks, self.rows, self.pdl = ranks, rows, pdl
        self._buffers: dict[tuple[int, torch.dtype], Tensor] = {}

    def begin(self, sums: int, size: int, width: int) -> None:
        """A session that sums (rows, size) so many times a token, and gathers `width` of each rank. All begin it."""
        return

    def buffer(self, size: int, dtype: torch.dtype) -> Tensor:
        """(rows, size), what products write before their sums."""
        if (size, dtype) not in self._buffers:
            self._buffers[size, dtype] = self._memory(self.rows * size, dtype).view(self.rows, size)
        return self._buffers[size, dtype]

    def _memory(self, elements: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(elements, dtype=dtype, device=self.ranks.device)

    @abstractmethod
    def sum(self, own: Tensor, into: Summed) -> list[Step]:
        """The steps of one sum: of `buffer`, which may be written again after them."""

    @abstractmethod
    def gather(self, own: Tensor, y: Tensor) -> list[Step]:
        """The steps of one gather: (rows, width) of each rank -> (rows, size)."""


class LibrarySums(Sums):
    """By the process group's library."""

    def __init__(self, ranks: Ranks, rows: int, pdl: bool) -> None:
        super().__init__(ranks, rows, pdl)
        self.name = "NCCL" if ranks.device.type == "cuda" else "Gloo"
        self._alone = Inboxes.of_one(ranks.device)

    def sum(self, own: Tensor, into: Summed) -> list[Step]:
        """As `Sums.sum`."""
        return [partial(self.ranks.sum_, own), self._written(own, into)]

    def _written(self, own: Tensor, into: Summed) -> Step:
        # Behind a kernel that is not ours, which never lets the next one begin early.
        return partial(sum_ranks, own, self._alone, 0, into.y, added=into.added, scale=into.scale, squares=into.squares)

    def gather(self, own: Tensor, y: Tensor) -> list[Step]:
        """As `Sums.gather`."""

        def step() -> None:
            y.copy_(self.ranks.gathered(own)[:, : y.shape[1]])

        return [step]


class OneShotSums(LibrarySums):
    """By torch's one-shot all-reduce on symmetric memory; gathers by the library."""

    def __init__(self, ranks: Ranks, rows: int, pdl: bool) -> None:
        super().__init__(ranks, rows, pdl)
        self.name = "one_shot_all_reduce"
        self._group = group_name()

    def _memory(self, elements: int, dtype: torch.dtype) -> Tensor:
        return shared_memory(self.ranks, elements, dtype)[0]

    def sum(self, own: Tensor, into: Summed) -> list[Step]:
        """As `Sums.sum`."""
        summed = torch.empty(own.shape, dtype=own.dtype, device=own.device)

        def one_shot() -> None:
            summed.copy_(torch.ops.symm_mem.one_shot_all_reduce(own, "sum", self._group))

        return [one_shot, self._written(summed, into)]


class InboxSums(Sums):
    """By one launch of ours, which also adds the sum to the stream (`teal_kernels.triton_ranks`)."""

    name = "inboxes"

    def __init__(self, ranks: Ranks, rows: int, pdl: bool, inboxes: Inboxes | None = None) -> None:
        super().__init__(ranks, rows, pdl)
        self._inboxes, self._next = inboxes, 0

    def begin(self, sums: int, size: int, width: int) -> None:
        """As `Sums.begin`; each sum of a token has places of its own."""
        count, self._next = self.ranks.count, 0
        places = sums * places_of_sum(count, self.rows, size) + places_of_sum(count, self.rows, width)
        if self._inboxes is None or len(self._inboxes.words[0]) < places:
            self._inboxes = open_inboxes(self.ranks, places)

    def _places(self, own: Tensor) -> tuple[Inboxes, int]:
        if self._inboxes is None:
            raise TypeError("no places are reserved")
        base = self._next
        self._next += places_of_sum(self.ranks.count, *own.shape)
        if self._next > len(self._inboxes.words[0]):
            raise ValueError("more sums than places were reserved for")
        return self._inboxes, base

    def sum(self, own: Tensor, into: Summed) -> list[Step]:
        """As `Sums.sum`."""
        inboxes, base = self._places(own)
        options: dict[str, Any] = {"added": into.added, "scale": into.scale, "squares": into.squares, "pdl": self.pdl}
        return [partial(sum_ranks, own, inboxes, base, into.y, **options)]

    def gather(self, own: Tensor, y: Tensor) -> list[Step]:
        """As `Sums.gather`."""
        inboxes, base = self._places(own)
        return [partial(gather_ranks, own, inboxes, base, y, pdl=self.pdl)]


@dataclass(frozen=True)
class SumTimes:
    """The ways that there are, and what a sum takes by each."""

    microseconds: dict[str, float]
    """Of the slowest rank; empty where nothing was measured."""
    ways: dict[str, type[Sums]]
    pdl: bool

    @property
    def chosen(self) -> str:
        """The fastest."""
        if not self.microseconds:
            return next(iter(self.ways))
        return min(self.microseconds, key=self.microseconds.__getitem__)

    @property
    def line(self) -> str:
        """What a user is told."""
        times = [f"{name} {time:.1f} us" for name, time in sorted(self.microseconds.items(), key=lambda item: item[1])]
        return f"a sum over ranks: {', '.join(times)}; {self.chosen} is taken" if times else f"sums by {self.chosen}"

    def open(self, ranks: Ranks, rows: int) -> Sums:
        """The way that is taken, for a session of so many rows."""
        return self.ways[self.chosen](ranks, rows, self.pdl)


@cache
def measure_sums(ranks: Ranks, size: int, dtype: torch.dtype, pdl: bool) -> SumTimes:
    """Time a sum of (1, size) by each way that there is here, inside a CUDA graph. All ranks find the same.

    Args:
        ranks: of the group.
        size: of the residual stream.
        dtype: of what is summed.
        pdl: launch while the kernel before still runs.
    """
    if ranks.device.type != "cuda":
        return SumTimes({}, {"Gloo": LibrarySums}, pdl)
    ways: dict[str, type[Sums]] = {"NCCL": LibrarySums}
    if peers_reach(ranks):
        ways |= {"one_shot_all_reduce": OneShotSums, "inboxes": InboxSums}
    return SumTimes({name: _microseconds(kind(ranks, 1, pdl), size, dtype) for name, kind in ways.items()}, ways, pdl)


@torch.no_grad()
def _microseconds(sums: Sums, size: int, dtype: torch.dtype) -> float:
    """Of one sum that is added to a stream."""
    device = sums.ranks.device
    sums.begin(_MEASURED_SUMS, size, size)
    own = sums.buffer(size, dtype).fill_(1e-3)
    stream, squares = torch.zeros(1, size, dtype=dtype, device=device), torch.empty(1, size, device=device)
    into = Summed(stream, added=True, squares=squares[:, : squares_of_sum(size)])
    steps = [step for _ in range(_MEASURED_SUMS) for step in sums.sum(own, into)]

    def run() -> None:
        for step in steps:
            step()

    run()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    graph.replay()
    times = []
    for _ in range(_ROUNDS):
        sums.ranks.wait()
        times.append(seconds_of(graph.replay, device))
    return sums.ranks.longest(sorted(times)[_ROUNDS // 2]) / _MEASURED_SUMS * 1e6
