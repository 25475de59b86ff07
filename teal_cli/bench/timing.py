"""Repeated measurements as median, minimum and maximum."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


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


def synchronize(device: torch.device) -> None:
    """Wait for the device's queue, before a host clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """What some work takes, from an empty queue of the device to an empty queue."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started
