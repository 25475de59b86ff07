"""Perplexity and drift of a sparse model against its own dense self, by the decode rule.

In a sequence the first `dense_prefix` positions run dense, as a prompt would, and the rest run
sparse, as decoding would; the loss counts the sparse positions only. Both halves go through one
forward pass with masked inputs, which is the mathematics of decoding token by token (tests hold
the two together).
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from teal_cli.sparse import SparsityControl


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


@torch.no_grad()
def compare(
    model: Any,
    control: SparsityControl,
    sequences: Iterable[Tensor],
    *,
    dense_prefix: int,
    on_sequence: Callable[[int], None] = lambda tokens: None,
) -> Comparison:
    """Run each sequence dense and sparse and compare.

    Args:
        model: a causal language model with sparse layers.
        control: its control.
        sequences: (tokens,) int64 each, longer than dense_prefix + 1.
        dense_prefix: positions that run dense.
        on_sequence: called with the number of tokens after each sequence.
    """
    dense_losses: list[float] = []
    sparse_losses: list[float] = []
    kl_sum = agreements = 0.0
    tokens = 0
    with control.counting() as counter:
        for sequence in sequences:
            ids = sequence.unsqueeze(0).to(model.device)
            targets = ids[0, dense_prefix + 1 :]
            keep = len(sequence) - dense_prefix
            with control.dense():
                dense = _log_probabilities(model, ids, keep)
            with control.masked(dense_prefix):
                sparse = _log_probabilities(model, ids, keep)
            dense_losses.append(float(F.nll_loss(dense, targets)))
            sparse_losses.append(float(F.nll_loss(sparse, targets)))
            kl_sum += float(F.kl_div(sparse, dense, log_target=True, reduction="sum"))
            agreements += float((dense.argmax(-1) == sparse.argmax(-1)).sum())
            tokens += len(targets)
            on_sequence(len(sequence))
    realised = counter.model_wide()
    ratio, ratio_error = _exponential([s - d for s, d in zip(sparse_losses, dense_losses, strict=True)])
    return Comparison(
        tokens=tokens,
        sequences=len(dense_losses),
        dense=Perplexity(*_exponential(dense_losses)),
        sparse=Perplexity(*_exponential(sparse_losses)),
        ratio=ratio,
        ratio_stderr=ratio_error,
        kl=kl_sum / tokens,
        top1_agreement=agreements / tokens,
        realised_sparsity=0.0 if realised is None else realised,
        realised_by_projection=counter.by_projection(),
    )


def _log_probabilities(model: Any, ids: Tensor, keep: int) -> Tensor:
    """(1, tokens) -> (keep - 1, vocabulary) float32: what the last `keep` positions but one predict."""
    logits: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits[0, :-1]
    return logits.float().log_softmax(-1)
