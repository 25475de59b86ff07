"""Repeated measurements as median, minimum and maximum."""

import statistics
from collections.abc import Sequence
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
