"""Levels of sparsity that one set of weights decodes at: of each, a rule for every projection."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.checkpoint.rules import Rule
from teal_cli.errors import UsageError
from teal_cli.sparse import SparseLinear, SparsityControl, apply_plan_, set_thresholds_, sparse_layers

DENSE = 0.0


class Levels:
    """What a scheduler's requests may ask for.

    The layers of the model have the rules of the default level, except inside `using`.

    Args:
        model: whose layers are sparse; or dense, then there is one level.
        control: of them; None for a dense model.
        plans: of each level above 0; None for the rules that the model has now, as the only one.
        default: of requests that say none; None for the highest.

    Raises:
        ArtefactError: a plan that is not the model's.
        UsageError: a default that is no level.
    """

    def __init__(
        self,
        model: Any,
        control: SparsityControl | None,
        plans: Mapping[float, SparsityPlan] | None = None,
        default: float | None = None,
    ) -> None:
        self._control = control
        self._layers = {} if control is None else sparse_layers(model)
        sparse: list[float] = []
        if control is not None and plans is None and control.decodes_sparse:
            sparse = [_target(model)]
        elif control is not None and plans:
            sparse = sorted(plans)
        self.all = (DENSE, *sparse)
        """From dense on up."""
        self.default = max(self.all) if default is None else default
        self.check(self.default)
        self._rules: dict[float, dict[str, Rule]] = {}
        for level, plan in (plans or {}).items():
            set_thresholds_(model, plan)
            self._rules[level] = self._of_layers()
        self._now = max(self.all) if self.default == DENSE else self.default
        if plans:
            apply_plan_(model, plans[self._now])
            self._keep_apart()
        elif sparse:
            self._rules[sparse[0]] = self._of_layers()
        self._thresholds = {
            level: {
                name: torch.tensor(rule.threshold, device=self._layers[name].storage.device)
                for name, rule in rules.items()
            }
            for level, rules in self._rules.items()
        }

    def _of_layers(self) -> dict[str, Rule]:
        return {name: layer.rule for name, layer in self._layers.items()}

    def _keep_apart(self) -> None:
        """Projections of one hidden state whose rules differ at some level are multiplied one by one at all."""
        groups: dict[int, list[SparseLinear]] = {}
        for layer in self._layers.values():
            groups.setdefault(id(layer.merged), []).append(layer)
        for layers in groups.values():
            if any(len({rules[layer.name] for layer in layers}) > 1 for rules in self._rules.values()):
                layers[0].merged.multiply_apart()

    def rules(self) -> tuple[Mapping[str, Rule], ...]:
        """Of each level, as `all` has them; a projection that is not named is dense."""
        return tuple(self._rules.get(level, {}) for level in self.all)

    def check(self, level: float | None) -> float:
        """A level that a request names, or the default.

        Raises:
            UsageError: there is no such level.
        """
        if level is None:
            return self.default
        if level not in self.all:
            raise UsageError(f"there is no sparsity {level:g} here, but {', '.join(f'{one:g}' for one in self.all)}")
        return level

    def using(self, level: float) -> AbstractContextManager[None]:
        """The rules of a level inside the block."""
        if self._control is None:
            return nullcontext()
        if level == DENSE:
            return self._control.switched_off()
        return nullcontext() if level == self._now else self._switched(level)

    @contextmanager
    def _switched(self, level: float) -> Iterator[None]:
        before, self._now = self._now, level
        self._set(level)
        try:
            yield
        finally:
            self._now = before
            self._set(before)

    def _set(self, level: float) -> None:
        thresholds = self._thresholds[level]
        for name, rule in self._rules[level].items():
            layer = self._layers[name]
            layer.rule, layer.threshold = rule, thresholds[name]


def _target(model: Any) -> float:
    """Of the rules that a model has: its checkpoint's, else what they expect on average."""
    stored = getattr(getattr(model.config, "quantization_config", None), "plan", None)
    if isinstance(stored, SparsityPlan) and stored.target_sparsity > 0:
        return float(stored.target_sparsity)
    shares = [layer.rule.expected_sparsity or 0.0 for layer in sparse_layers(model).values()]
    return max(sum(shares) / max(len(shares), 1), 1e-9)
