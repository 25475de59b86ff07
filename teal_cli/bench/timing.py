"""Repeated measurements as median, minimum and maximum."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

_REPLAYS = 7
_SECONDS = 0.01
"""Timed for at least so long: a GPU that was idle takes milliseconds to reach its clock."""


@dataclass(frozen=True)
class Spread:
    """A repeated measurement; never quoted without its spread."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summary of at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    @classmethod
    def of_ratios(cls, ours: Sequence[float], theirs: Sequence[float]) -> "Spread":
        """Of ours over theirs, round by round: what slows both in a round is in no ratio.

        Args:
            ours: one value a round, at least one round.
            theirs: of the same rounds.
        """
        return cls.of([own / other for own, other in zip(ours, theirs, strict=True)])


def graph_microseconds(launch: Callable[[int], object], launches: int) -> Spread:
    """Microseconds of one of many launches on a GPU, as a CUDA graph has them one right behind the other.

    Args:
        launch: told its number, by which it may choose other weights: what is in a cache must not be timed.
        launches: in the graph.
    """
    launch(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(launches):
            launch(index)
    graph.replay()
    times: list[float] = []
    while len(times) < _REPLAYS or sum(times) * launches < _SECONDS * 1e6:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / launches)
    return Spread.of(times)
