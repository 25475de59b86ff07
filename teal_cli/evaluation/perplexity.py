"""Perplexity and drift of a sparse model against its own dense self, by the decode rule.

In a sequence the first `dense_prefix` positions run dense, as a prompt would, and the rest run
sparse, as decoding would; the loss counts the sparse positions only. Both halves go through one
forward pass with masked inputs, which is the mathematics of decoding token by token (tests hold
the two together).

An encoder-decoder reads the first half of a sequence with its encoder and is scored on the second
half, which its decoder says; both drop inputs at every position.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.models.architectures import architecture_for
from teal_cli.models.forward import halves, run_text
from teal_cli.sparse import SparsityCounter, control_of, set_thresholds_


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean loss, with the standard error that the spread between sequences gives."""

    perplexity: float
    stderr: float | None
    """None for a single sequence, which shows no spread."""


@dataclass(frozen=True)
class Comparison:
    """A sparse model beside its dense self on the same positions."""

    tokens: int
    """Positions whose loss was counted."""
    sequences: int
    dense: Perplexity
    sparse: Perplexity
    ratio: float
    """Sparse perplexity over dense."""
    ratio_stderr: float | None
    """From the paired differences: far smaller than those of the two perplexities."""
    kl: float
    """Mean KL(dense || sparse) a token, in nats."""
    top1_agreement: float
    """Share of positions where both put the same token first."""
    realised_sparsity: float
    realised_by_projection: dict[str, float]


def _mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """Mean, and its standard error over sequences."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def _exponential(values: list[float]) -> tuple[float, float | None]:
    """exp of the mean, with its error to first order."""
    mean, error = _mean_and_error(values)
    return math.exp(mean), None if error is None else math.exp(mean) * error


class _Score:
    """What is added up for one plan and dense prefix."""

    def __init__(self) -> None:
        self.counter = SparsityCounter()
        self.dense_losses: list[float] = []
        self.sparse_losses: list[float] = []
        self.kl = self.agreements = 0.0
        self.tokens = 0

    def add(self, dense: Tensor, sparse: Tensor, targets: Tensor) -> None:
        """One sequence: log probabilities (positions, vocabulary) of both, and what came (positions,)."""
        self.dense_losses.append(float(F.nll_loss(dense, targets)))
        self.sparse_losses.append(float(F.nll_loss(sparse, targets)))
        self.kl += float(F.kl_div(sparse, dense, log_target=True, reduction="sum"))
        self.agreements += float((dense.argmax(-1) == sparse.argmax(-1)).sum())
        self.tokens += len(targets)

    def result(self) -> Comparison:
        ratio, error = _exponential([s - d for s, d in zip(self.sparse_losses, self.dense_losses, strict=True)])
        return Comparison(
            tokens=self.tokens,
            sequences=len(self.dense_losses),
            dense=Perplexity(*_exponential(self.dense_losses)),
            sparse=Perplexity(*_exponential(self.sparse_losses)),
            ratio=ratio,
            ratio_stderr=error,
            kl=self.kl / self.tokens,
            top1_agreement=self.agreements / self.tokens,
            realised_sparsity=self.counter.model_wide() or 0.0,
            realised_by_projection=self.counter.by_projection(),
        )


@torch.no_grad()
def compare(
    model: Any,
    plans: Sequence[SparsityPlan],
    sequences: Iterable[Tensor],
    *,
    dense_prefixes: Sequence[int],
    on_sequence: Callable[[int], None] = lambda tokens: None,
    dense: Any = None,
) -> list[list[Comparison]]:
    """Run each sequence dense, and sparse by every plan, and compare; the dense pass serves all.

    Args:
        model: a decoder or encoder-decoder with sparse layers; takes on the thresholds of the last plan.
        plans: what to compare.
        sequences: (tokens,) int64 each, longer than any dense prefix + 1.
        dense_prefixes: positions that run dense; each is an evaluation of its own. [0] for an encoder-decoder.
        on_sequence: called with the number of tokens after each sequence.
        dense: another model to compare with, on the same device: what `model` was before it was adapted.

    Returns:
        For each plan, for each dense prefix, the comparison.
    """
    control = control_of(model)
    scores = [[_Score() for _ in dense_prefixes] for _ in plans]
    for sequence in sequences:
        ids = sequence.unsqueeze(0).to(model.device)
        with control.dense():
            all_dense, _ = _predictions(model if dense is None else dense, ids, min(dense_prefixes))
        for plan, of_plan in zip(plans, scores, strict=True):
            set_thresholds_(model, plan)
            for prefix, score in zip(dense_prefixes, of_plan, strict=True):
                with control.masked(prefix), control.counting(score.counter):
                    sparse, targets = _predictions(model, ids, prefix)
                score.add(all_dense[-len(sparse) :], sparse, targets)
        on_sequence(len(sequence))
    return [[score.result() for score in of_plan] for of_plan in scores]


def _predictions(model: Any, ids: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """(1, tokens) -> (positions, vocabulary) float32 log probabilities of what comes after a prefix, and what came."""
    if architecture_for(model).kind == "seq2seq":
        logits, targets = run_text(model, ids).logits[0], halves(model, ids).target[0]
    else:
        logits = run_text(model, ids, logits_to_keep=ids.shape[1] - prefix).logits[0, :-1]
        targets = ids[0, prefix + 1 :]
    return logits.float().log_softmax(-1), targets
