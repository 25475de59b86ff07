"""How near an encoder's hidden states stay to its dense self's: an encoder predicts no text to be scored on.

Every position drops inputs: an encoder has no prompt that runs dense and no step that decodes.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.models.forward import run_text
from teal_cli.sparse import SparsityCounter, control_of, set_thresholds_


@dataclass(frozen=True)
class Similarity:
    """A sparse encoder beside its dense self on the same sequences."""

    sequences: int
    tokens: int
    cosine: float
    """Mean over sequences of the cosine between the means of the last hidden states."""
    cosine_stderr: float | None
    """None for a single sequence."""
    least_cosine: float
    relative_error: float
    """Norm of the difference of the last hidden states over the dense one's, all positions together."""
    realised_sparsity: float
    realised_by_projection: dict[str, float]


class _Score:
    """What is added up for one plan."""

    def __init__(self) -> None:
        self.counter = SparsityCounter()
        self.cosines: list[float] = []
        self.tokens = 0
        self.difference = self.norm = 0.0

    def add(self, dense: Tensor, sparse: Tensor) -> None:
        """Last hidden states of one sequence: (tokens, hidden) float32 of both."""
        self.cosines.append(float(F.cosine_similarity(dense.mean(0), sparse.mean(0), dim=0)))
        self.tokens += len(dense)
        self.difference += float((sparse - dense).double().square().sum())
        self.norm += float(dense.double().square().sum())

    def result(self) -> Similarity:
        values = torch.tensor(self.cosines, dtype=torch.float64)
        return Similarity(
            sequences=len(values),
            tokens=self.tokens,
            cosine=float(values.mean()),
            cosine_stderr=float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None,
            least_cosine=float(values.min()),
            relative_error=math.sqrt(self.difference / self.norm),
            realised_sparsity=self.counter.model_wide() or 0.0,
            realised_by_projection=self.counter.by_projection(),
        )


@torch.no_grad()
def compare_states(
    model: Any,
    plans: Sequence[SparsityPlan],
    sequences: Iterable[Tensor],
    *,
    on_sequence: Callable[[int], None] = lambda tokens: None,
) -> list[Similarity]:
    """Run each sequence dense, and sparse by every plan.

    Args:
        model: an encoder with sparse layers; takes on the thresholds of the last plan.
        plans: what to compare.
        sequences: (tokens,) int64 each, of any lengths.
        on_sequence: called with the number of tokens after each sequence.
    """
    control = control_of(model)
    scores = [_Score() for _ in plans]
    for sequence in sequences:
        ids = sequence.unsqueeze(0).to(model.device)
        with control.dense():
            dense = run_text(model, ids).last_hidden_state[0].float()
        for plan, score in zip(plans, scores, strict=True):
            set_thresholds_(model, plan)
            with control.masked(0), control.counting(score.counter):
                score.add(dense, run_text(model, ids).last_hidden_state[0].float())
        on_sequence(len(sequence))
    return [score.result() for score in scores]
