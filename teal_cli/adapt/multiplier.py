"""The weight of an L1 loss over a run: ProSparse's stages (arXiv 2402.13516), or steered to a share of zeros."""

import math
from collections.abc import Sequence

_RISE = (0.05, 0.6)
"""Shares of the steps between which the wanted share of zeros grows; after that the model trains at it."""
_QUICK, _SLOW = 10.0, 150.0
"""How far the logarithm of the weight moves where the share is wrong by 1: at once, and if it stays so for a run."""
_TOO_MANY = 0.01
"""Share of zeros above what is wanted at which nothing asks for more: a neuron that is always zero gets no gradient,
and does not come back when the weight falls."""
_FURTHEST = math.log(1e3)
"""From the weight to begin with, either way: a run too short to follow must not end in the L1 loss alone."""


def along_sine(before: float, after: float, at: float) -> float:
    """From one value to another along half a sine, flat at both ends; `at` runs from 0 to 1."""
    return before + 0.5 * (math.sin(-math.pi / 2 + math.pi * at) + 1.0) * (after - before)


def staged(at: float, stages: Sequence[tuple[float, float]]) -> float:
    """The weight of a stage: along a sine from the one before to its own.

    Where all before are 0, the stage is a warm-up, and its weight constant. Equal neighbours make a flat stage.

    Args:
        at: share of the steps that are done, 0 to 1.
        stages: where each ends, and its weight.
    """
    begin, before, warm = 0.0, 0.0, False
    for end, weight in stages:
        if at <= end:
            return along_sine(before, weight, (at - begin) / (end - begin)) if warm else weight
        begin, before, warm = end, weight, warm or weight > 0.0
    return before


class Steering:
    """Finds the weight by which a share of zeros follows what is wanted: it grows along a sine, then stays.

    The logarithm of the weight answers to the error, and to the sum of all errors so far; with too many zeros it is 0.

    Args:
        weight: to begin with.
        zeros: to reach.
    """

    def __init__(self, weight: float, zeros: float) -> None:
        self.zeros = zeros
        self.start: float | None = None
        """Share of zeros at the beginning."""
        self.total = 0.0
        """Of all errors, each times the share of the run that it lasted."""
        self._first = math.log(weight)

    def wanted(self, at: float) -> float:
        """The share of zeros that is wanted where a share of the steps is done."""
        begin, end = _RISE
        start = self.zeros if self.start is None else self.start
        return along_sine(start, self.zeros, min(max((at - begin) / (end - begin), 0.0), 1.0))

    def weight(self, at: float, found: float, step: float) -> float:
        """The weight of the next loss.

        Args:
            at: share of the steps that are done.
            found: share of zeros just seen.
            step: share of the run that the pass is in which they were seen.
        """
        if self.start is None:
            self.start = found
        error = self.wanted(at) - found
        self.total = _within(self.total + error * step, _FURTHEST / _SLOW)
        if at < _RISE[0] or error <= -_TOO_MANY:
            return 0.0
        further = _within(_QUICK * error + _SLOW * self.total, _FURTHEST)
        return min(1.0, 1.0 + error / _TOO_MANY) * math.exp(self._first + further)


def _within(value: float, most: float) -> float:
    return min(max(value, -most), most)
