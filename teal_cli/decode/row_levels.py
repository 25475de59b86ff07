"""Rows of one session that decode at levels of sparsity of their own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from teal_cli.checkpoint.rules import ASSUMED_ZEROS, Dense, Rule
from teal_cli.sparse import SparseLinear


@dataclass(frozen=True)
class RowLevels:
    """The rules of each level, of which every row of a session has one. They are thresholds: data, not weights."""

    rules: tuple[Mapping[str, Rule], ...]
    """Of each level: projection -> rule. One that is not named is dense."""
    tuned_for: int
    """The level by which a session decides how products are divided."""

    def of(self, layer: nn.Module) -> tuple[Rule, ...]:
        """A layer's rule at each level."""
        if not isinstance(layer, SparseLinear):
            return (Dense(),) * len(self.rules)
        return tuple(rules.get(layer.name, Dense()) for rules in self.rules)


def most_expected(rules: Sequence[Rule]) -> float:
    """Share of inputs that is skipped, by the rule that skips most."""
    shares = (rule.expected_sparsity for rule in rules)
    return max(ASSUMED_ZEROS if share is None else share for share in shares)
