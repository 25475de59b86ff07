"""Counting what layers really skip: realised sparsity."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from teal_cli.ranks.group import Ranks


@dataclass
class _Tally:
    """Inputs seen and dropped by one projection."""

    seen: Tensor | int = 0
    dropped: Tensor | int = 0
    """Both are 0-d tensors on the device until they are read, so that counting does not synchronise."""


class SparsityCounter:
    """Counts what is really dropped: realised sparsity, by projection and model-wide."""

    def __init__(self) -> None:
        self.active = True
        """Set to False to let calls go by uncounted."""
        self.output: str | None = None
        """The output layer, where it drops inputs: what it does not read counts, what it has does not."""
        self.beside = 0
        """Weights that every token reads beside those of projections: routers'. They count against what is skipped."""
        self.ranks: Ranks | None = None
        """Whose counts are added up, where several hold the model: then each of them must ask."""
        self.whole: Mapping[str, int] = {}
        """Then the weights of each whole layer, whose parts ranks hold, and perhaps several of them the same part."""
        self.before_totals: Callable[[], None] = lambda: None
        """Has the other ranks ask, where they do what one of them says."""
        self._tallies: dict[str, _Tally] = {}
        self._weights: dict[str, int] = {}
        self._sources: list[Callable[[], dict[str, tuple[int, int, int]]]] = []

    def add(self, name: str, parameters: int, seen: Tensor | int, dropped: Tensor | int) -> None:
        """Count one call of a projection: the inputs that it could have dropped, and those that it did."""
        tally = self._tallies.setdefault(name, _Tally())
        self._weights[name] = parameters
        tally.seen = tally.seen + seen
        tally.dropped = tally.dropped + dropped

    def add_source(self, read: Callable[[], dict[str, tuple[int, int, int]]]) -> None:
        """Take counts from elsewhere too: projection -> parameters, inputs seen, inputs dropped, read when asked."""
        self._sources.append(read)

    def remove_source(self, read: Callable[[], dict[str, tuple[int, int, int]]]) -> None:
        """Take no more counts from there. Those of so far stay, if they can still be read."""
        self._sources.remove(read)
        with suppress(Exception):  # the device may have failed
            for name, (parameters, seen, dropped) in read().items():
                if seen:
                    self.add(name, parameters, seen, max(dropped, 0))

    def counts(self) -> "Counts":
        """What was counted so far."""
        seen_of = _numbers([tally.seen for tally in self._tallies.values()])
        dropped_of = _numbers([tally.dropped for tally in self._tallies.values()])
        found = {
            name: (self._weights[name], seen, dropped)
            for name, seen, dropped in zip(self._tallies, seen_of, dropped_of, strict=True)
        }
        for read in self._sources:
            for name, (parameters, more_seen, more_dropped) in read().items():
                _, seen, dropped = found.get(name, (0, 0, 0))
                found[name] = parameters, seen + more_seen, dropped + more_dropped
        if self.ranks is not None:
            self.before_totals()
            totals = iter(self.ranks.totals([number for _, *inputs in found.values() for number in inputs]))
            found = {name: (self.whole[name], next(totals), next(totals)) for name in found}
        return Counts(found, self.output, self.beside)

    def by_projection(self) -> dict[str, float]:
        """Realised sparsity of each projection that was called while sparsity was on; 0 where it drops nothing."""
        return self.counts().by_projection()

    def model_wide(self) -> float | None:
        """As `Counts.model_wide`."""
        return self.counts().model_wide()


def _numbers(values: Sequence[Tensor | int]) -> list[int]:
    """Read with one wait for each device."""
    found: list[int] = [0] * len(values)
    places: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for index, value in enumerate(values):
        if isinstance(value, Tensor):
            places.setdefault(value.device, []).append((index, value))
        else:
            found[index] = value
    for held in places.values():
        numbers = torch.stack([value.long() for _, value in held]).tolist()
        for (index, _), number in zip(held, numbers, strict=True):
            found[index] = int(number)
    return found


@dataclass(frozen=True)
class Counts:
    """What a counter had counted at one time."""

    projections: dict[str, tuple[int, int, int]]
    """Parameters, inputs seen and inputs dropped."""
    output: str | None
    """As `SparsityCounter.output`."""
    beside: int
    """As `SparsityCounter.beside`."""

    def since(self, before: "Counts") -> "Counts":
        """What was counted from then on."""
        found = {}
        for name, (parameters, seen, dropped) in self.projections.items():
            _, seen_before, dropped_before = before.projections.get(name, (0, 0, 0))
            found[name] = parameters, seen - seen_before, dropped - dropped_before
        return Counts(found, self.output, self.beside)

    def by_projection(self) -> dict[str, float]:
        """Dropped inputs over those seen, of each projection that was called."""
        return {name: dropped / seen for name, (_, seen, dropped) in self.projections.items() if seen}

    def model_wide(self) -> float | None:
        """Weights not read over the weights of the blocks' projections; None if sparsity was never on.

        The definition is `models.architectures.block_weights`'. Where routers read more than is skipped it is 0.
        """
        realised = self.by_projection()
        weights = {name: parameters for name, (parameters, _, _) in self.projections.items()}
        total = sum(weights[name] for name in realised if name != self.output)
        if not total:
            return None
        skipped = sum(value * weights[name] for name, value in realised.items())
        return max(skipped - self.beside, 0.0) / total if self.beside else skipped / total
