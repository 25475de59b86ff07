"""Which projections of a plan a layer of vLLM holds. Knows nothing of vLLM but the names of its layers."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from teal_cli.checkpoint.rules import ASSUMED_ZEROS, Dense, Rule
from teal_cli.errors import ArtefactError
from teal_cli.vllm_plugin.product import MOST_PARTS

_NAMED = 3
"""Projections that an error names."""


@dataclass(frozen=True)
class LayerRules:
    """What the projections skip that lie side by side in a layer."""

    parts: list[int]
    """Outputs of each."""
    bounds: list[float]
    """Of each the threshold."""
    sparsity: float
    """Expected, weighted by outputs."""

    @classmethod
    def of(cls, rules: list[Rule], outputs: list[int]) -> "LayerRules":
        """Of the rules of all projections and the outputs that this process has of each.

        One rule may be of all outputs. Neighbours with one threshold are one part.

        Raises:
            ArtefactError: rules that do not fit the outputs, or more parts than a product takes.
        """
        if len(rules) == 1:
            outputs = [sum(outputs)]
        if len(rules) != len(outputs):
            raise ArtefactError(f"vLLM has a layer of {len(outputs)} parts for {len(rules)} projections of this plan")
        parts: list[int] = []
        bounds: list[float] = []
        for rule, size in zip(rules, outputs, strict=True):
            if bounds and bounds[-1] == rule.threshold:
                parts[-1] += size
            else:
                parts.append(size)
                bounds.append(rule.threshold)
        if len(parts) > MOST_PARTS:
            raise ArtefactError(
                f"vLLM has a layer of {len(parts)} parts with thresholds of their own, not {MOST_PARTS} at most"
            )
        skipped = sum(size * _expected(rule) for rule, size in zip(rules, outputs, strict=True))
        return cls(parts, bounds, skipped / sum(outputs))

    def thresholds(self, device: torch.device) -> Tensor:
        """(parts,) float32."""
        return torch.tensor(self.bounds, dtype=torch.float32, device=device)


def _expected(rule: Rule) -> float:
    return ASSUMED_ZEROS if rule.expected_sparsity is None else rule.expected_sparsity


class PlannedLayers:
    """The projections of a plan, and which of them vLLM's model has asked for.

    Args:
        rules: by module path.
    """

    def __init__(self, rules: Mapping[str, Rule]) -> None:
        self._rules = dict(rules)
        self._asked: set[str] = set()
        self._blocks: set[str] = set()

    def rename(self, renamed: Callable[[dict[str, Rule]], dict[str, Rule]]) -> None:
        """Give all projections other names."""
        self._rules = renamed(self._rules)

    def rules_of(self, layer: str, packed: Mapping[str, list[str]]) -> list[Rule] | None:
        """The rules of a layer's projections; None where nothing is skipped.

        Args:
            layer: its module path in vLLM.
            packed: of layers that hold several projections: last name -> their last names.
        """
        layer = layer.removeprefix(".")  # models without a prefix of their own say ".lm_head"
        self._blocks.add(_block_of(layer))
        path, dot, last = layer.rpartition(".")
        names = [f"{path}{dot}{name}" for name in packed.get(last, [last])]
        self._asked.update(names)
        rules: list[Rule] = [self._rules.get(name, Dense()) for name in names]
        return None if all(isinstance(rule, Dense) for rule in rules) else rules

    def check_complete(self) -> None:
        """Call when the model is built. Blocks that other processes have (pipeline parallelism) are theirs.

        Raises:
            ArtefactError: rules of blocks that no layer asked for, which would be dense in silence.
        """
        missed = [name for name in self._not_asked() if _block_of(name) in self._blocks - {""}]
        if missed:
            named = ", ".join(missed[:_NAMED]) + (", ..." if len(missed) > _NAMED else "")
            raise ArtefactError(
                f"vLLM's model has no layers that could skip the inputs of {len(missed)} projections ({named}): export "
                "with an allocation that leaves them dense"
            )

    @property
    def misses_output_layer(self) -> bool:
        """Whether no layer has asked for the rule of the output layer: some models multiply with their embeddings."""
        return any(_block_of(name) == "" for name in self._not_asked())

    def _not_asked(self) -> list[str]:
        return [n for n, rule in self._rules.items() if n not in self._asked and not isinstance(rule, Dense)]


def _block_of(name: str) -> str:
    """The number of a block in a module path; empty outside of blocks."""
    found = re.search(r"\.(\d+)\.", name)
    return "" if found is None else found[1]
