"""A small predictor in front of the output layer: a sketch proposes rows, and only these are read exactly.

A sketch gives all logits roughly. Its best rows get their exact logits. Greedy decoding then errs only where the true
best row is not among them; for perplexity all other rows keep the sketch's logits. In both sketches a row is taken less
the rows' mean, which all logits share, and which is read as well. There are two:

- low rank: the matrix of low rank that is nearest to the weights on the calibration's hidden states; held besides.
- dropped inputs: the weights themselves, of the largest inputs alone, as for every other projection.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Rough(Protocol):
    """Logits that read a part of the weights."""

    def logits(self, states: Tensor) -> Tensor:
        """(positions, in) -> (positions, vocabulary)."""
        ...

    def weights_read(self) -> float:
        """A token, so far."""
        ...


@dataclass(frozen=True)
class LowRank:
    """By two thin matrices."""

    down: Tensor
    """(rank, in)."""
    up: Tensor
    """(vocabulary, rank)."""
    mean: Tensor
    """(in,): the rows' mean."""

    def logits(self, states: Tensor) -> Tensor:
        """As `Rough.logits`."""
        return states @ self.down.T @ self.up.T + (states @ self.mean)[:, None]

    def weights_read(self) -> float:
        """As `Rough.weights_read`."""
        return self.down.numel() + self.up.numel() + self.mean.numel()


@dataclass
class LargestInputs:
    """By the inputs above a threshold."""

    head: Tensor
    """(vocabulary, in)."""
    threshold: float
    seen: int = 0
    kept: int = 0

    def __post_init__(self) -> None:
        self.mean = self.head.mean(0)
        self._centred = self.head - self.mean

    def logits(self, states: Tensor) -> Tensor:
        """As `Rough.logits`."""
        active = states.abs() > self.threshold
        self.seen += active.numel()
        self.kept += int(active.sum())
        return (states * active) @ self._centred.T + (states @ self.mean)[:, None]

    def weights_read(self) -> float:
        """As `Rough.weights_read`, by the inputs that were kept."""
        return self.head.numel() * self.kept / max(self.seen, 1) + self.mean.numel()


def with_exact_rows(rough: Tensor, exact: Tensor, rows: int) -> Tensor:
    """Rough logits with the best rows' exact ones: (positions, vocabulary) each."""
    best = rough.topk(rows, dim=-1).indices
    return rough.scatter(1, best, exact.gather(1, best))


@torch.no_grad()
def low_rank(head: Tensor, states: Tensor, rank: int) -> LowRank:
    """The sketch of this rank with the least squared error of the logits.

    Args:
        head: (vocabulary, in).
        states: (tokens, in) that the output layer reads, for the covariance.
        rank: of the sketch.
    """
    mean = head.mean(0)
    weight, moment = (head - mean).double(), states.double().T @ states.double()
    values, axes = torch.linalg.eigh(moment)
    values = values.clamp(min=float(values.max()) * 1e-9).sqrt()
    root, inverse = axes * values, axes / values
    # Of the weight in coordinates where inputs are white, the best right singular vectors.
    right = torch.linalg.eigh((weight @ root).T @ (weight @ root))[1].flip(1)[:, :rank]
    return LowRank((right.T @ inverse.T).to(head), (weight @ (root @ right)).to(head), mean)


def largest_inputs(head: Tensor, states: Tensor, sparsity: float) -> LargestInputs:
    """The sketch that drops this share of the inputs of the given hidden states, (tokens, in)."""
    magnitudes = states.abs().flatten()
    return LargestInputs(head, float(magnitudes.kthvalue(max(1, round(sparsity * magnitudes.numel())))[0]))
