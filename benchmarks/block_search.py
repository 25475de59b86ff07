"""An evolutionary search over blocks that starts from fisher (WiSparse, arXiv 2602.14452; EvoPress, 2410.14649).

What is searched is how much dearer or cheaper each block, and the output layer, is than fisher's first-order costs say:
a factor of its sensitivities. Fisher then spreads by the changed costs, so every candidate reads the same bytes.
Fitness is KL(dense || sparse) on the calibration's text, with thresholds settled in the sparse network.
"""

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from equal_bytes import PREFIX, last_states, logits_behind
from torch import Tensor

from teal_cli.allocation.fisher import curve, hull
from teal_cli.checkpoint.calibration import Calibration
from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.checkpoint.rules import Rule, threshold_rule
from teal_cli.models.architectures import block_weights
from teal_cli.sparse import control_of, recalibrate_

Genome = tuple[float, ...]
"""Of every group, the logarithm of the factor of its costs."""


def group_of(name: str) -> str:
    """The block of a projection, or the output layer: the number behind the stack's name."""
    return next((part for part in name.split(".") if part.isdigit()), name)


@dataclass
class Search:
    """A (1 + lambda) evolution whose children mostly die on a part of the text."""

    model: Any
    """With sparse layers."""
    calibration: Calibration
    target: float
    text: Tensor
    """(sequences, LENGTH) of the calibration's half; the first are what every child is tried on."""
    head: Tensor
    few: int = 2
    """Sequences that every child is tried on; the best quarter is tried on all."""
    seed: int = 0
    tried: int = 0
    curve: list[float] = field(default_factory=list)
    """Fitness of the best on all of the text, after each generation."""

    def __post_init__(self) -> None:
        self.groups = list(dict.fromkeys(group_of(p.name) for p in self.calibration.projections))
        self._random = random.Random(self.seed)
        self._sizes = {p.name: p.weights_read for p in self.calibration.projections}
        self._pieces = [
            ((cost - cost_0) / ((share - share_0) * p.weights_read), p.name, share_0, share)
            for p in self.calibration.projections
            for (share_0, cost_0), (share, cost) in itertools.pairwise(
                hull(curve(self.calibration.histograms[p.site], self.calibration.sensitivities[p.name]))
            )
        ]
        with control_of(self.model).switched_off():
            self._wanted = [last_states(self.model, ids) for ids in self.text]

    def sparsities(self, genome: Genome) -> dict[str, float]:
        """Fisher's by the changed costs; its hulls are made once, which it would make for every candidate."""
        factors = {group: math.exp(value) for group, value in zip(self.groups, genome, strict=True)}
        found = dict.fromkeys(self._sizes, 0.0)
        missing = self.target * block_weights(self.calibration.projections)
        changed = [(slope * factors[group_of(name)], name, start, stop) for slope, name, start, stop in self._pieces]
        for _, name, start, stop in sorted(changed):
            if missing <= 0.0:
                break
            taken = min((stop - start) * self._sizes[name], missing)
            found[name] = start + taken / self._sizes[name]
            missing -= taken
        return found

    def plan(self, genome: Genome) -> SparsityPlan:
        """The sparsities as rules; their thresholds are for `recalibrate_` to settle."""
        rules: dict[str, Rule] = {name: threshold_rule(0.0, share) for name, share in self.sparsities(genome).items()}
        return SparsityPlan("searched", self.target, rules)

    @torch.no_grad()
    def fitness(self, genome: Genome, sequences: int) -> float:
        """Mean KL(dense || sparse) in nats a token on the first sequences; the model takes on the thresholds."""
        self.tried += sequences
        recalibrate_(self.model, self.plan(genome), self.text[:sequences], dense_prefix=PREFIX)
        total = 0.0
        for ids, states in zip(self.text[:sequences], self._wanted, strict=False):
            with control_of(self.model).masked(PREFIX):
                found = logits_behind(self.model, ids).float().log_softmax(-1)
            wanted = (states @ self.head.T).float().log_softmax(-1)
            total += float(F.kl_div(found, wanted, log_target=True, reduction="batchmean"))
        return total / sequences

    def mutated(self, genome: Genome, step: float) -> Genome:
        """One to four groups dearer or cheaper."""
        child = list(genome)
        for index in self._random.sample(range(len(child)), min(len(child), self._random.randint(1, 4))):
            child[index] += self._random.gauss(0.0, step)
        return tuple(child)

    def run(self, generations: int, children: int, say: Callable[[str], None]) -> Genome:
        """The best genome that was found; all zeros is fisher's."""
        best: Genome = (0.0,) * len(self.groups)
        best_few, best_all = self.fitness(best, self.few), self.fitness(best, len(self.text))
        self.curve.append(best_all)
        for generation in range(generations):
            step = 1.0 * 0.5 ** (2.0 * generation / max(generations, 1))
            tried = sorted((self.fitness(child, self.few), child) for child in self._litter(best, children, step))
            for few, child in tried[: max(1, children // 4)]:
                if few >= best_few:
                    break
                found = self.fitness(child, len(self.text))
                if found < best_all:
                    best, best_few, best_all = child, few, found
            self.curve.append(best_all)
            say(f"generation {generation + 1}: KL {best_all:.4f}, fisher {self.curve[0]:.4f}")
        return best

    def _litter(self, genome: Genome, children: int, step: float) -> list[Genome]:
        return [self.mutated(genome, step) for _ in range(children)]
