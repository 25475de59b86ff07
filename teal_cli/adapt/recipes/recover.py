"""recover: training under the thresholds of an export, so that the model learns to do without what they drop."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from teal_cli.adapt.followed import FollowedThresholds
from teal_cli.adapt.recipe import Batch, Outcome, Recipe, Stage
from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.config.recipes.recover import Options
from teal_cli.errors import UsageError
from teal_cli.models.architectures import find_projections
from teal_cli.sparse import (
    SparsityControl,
    SparsityCounter,
    recalibrate_,
    replace_projections_,
    set_thresholds_,
)


class _Vector(NamedTuple):
    """The vector of one projection."""

    layer: nn.Linear
    vector: nn.Parameter
    """(out,) float32: what its bias is now."""
    dense_bias: nn.Parameter | None
    """What it was."""


class Recover(Recipe):
    """Thresholds in the forward, as an export would set them; afterwards they are set anew at the same sparsities.

    Three kinds of training: of the weights, of adapters (`--lora`), or of nothing but a constant vector a projection
    (option `vectors`), which takes the place of what dropped inputs would have added on average. That is the idea of
    spontaneous neurons (SPON, arXiv 2512.12744); ours is added to the product and becomes a bias, which costs nothing.
    """

    name = "recover"
    needs_plan = True

    @property
    def _options(self) -> Options:
        assert isinstance(self.setting.options, Options)  # noqa: S101  (the configuration's word)
        return self.setting.options

    @property
    def _plan(self) -> SparsityPlan:
        assert self.setting.plan is not None  # noqa: S101  (needs_plan)
        return self.setting.plan

    @property
    def base_is_frozen(self) -> bool:
        """Yes of vectors."""
        return self._options.vectors

    def check(self, model: nn.Module) -> None:
        """See `Recipe`."""
        if self._options.vectors and self.setting.lora:
            raise UsageError("option vectors trains nothing but vectors: leave out lora (flag --lora)")
        if self._options.vectors:
            _bias_switches(model)

    def operate_(self, model: nn.Module, measured: Mapping[str, Tensor]) -> None:
        """See `Recipe`."""
        plan = self._plan
        self._control: SparsityControl = replace_projections_(model, plan.projections)
        self._control.straight_through = self._options.gradient == "straight-through"
        set_thresholds_(model, plan)
        self.followed = FollowedThresholds(model) if self._options.thresholds == "followed" else None
        self._counter = SparsityCounter()
        self._switches: list[str] = []
        self._vectors: list[_Vector] = []
        if not self._options.vectors:
            return
        self._switches, names = _bias_switches(model)
        for layer in (cast(nn.Linear, model.get_submodule(name)) for name in names):
            before: nn.Parameter | None = layer.bias
            zeros = layer.weight.new_zeros(layer.out_features, dtype=torch.float32)
            layer.bias = nn.Parameter(zeros if before is None else before.detach().float().clone())
            self._vectors.append(_Vector(layer, layer.bias, before))

    def stages(self, steps: int) -> Sequence[Stage]:
        """See `Recipe`."""
        return [Stage("recover", steps, keep_best=True)]

    def trainable(self, model: nn.Module, stage: Stage, names: Sequence[str]) -> Sequence[str]:
        """See `Recipe`."""
        if not self._vectors:
            return names
        vectors = {id(each.vector) for each in self._vectors}
        return [name for name, parameter in model.named_parameters() if id(parameter) in vectors]

    @property
    def can_replay(self) -> bool:
        """See `Recipe`."""
        return True

    def left(self) -> Any:
        """See `Recipe`."""
        return self._counter, super().left()

    def take_left_(self, left: Any) -> None:
        """See `Recipe`."""
        self._counter, of_looks = left
        super().take_left_(of_looks)

    @contextmanager
    def student_pass(self, model: nn.Module, batch: Batch) -> Iterator[None]:
        """See `Recipe`."""
        control = self._control
        if not batch.again:
            self._counter = SparsityCounter()
        counted = control.uncounted() if batch.again else control.counting(self._counter)
        with control.masked(batch.dense_prefix), counted, self.follows(model, batch):
            if batch.again:  # blocks are called without their model, whose hook would begin the pass
                control.begin_pass(model, (batch.input_ids,), {})
            yield

    @contextmanager
    def as_dense(self, model: nn.Module) -> Iterator[None]:
        """See `Recipe`."""
        for each in self._vectors:
            each.layer.bias = each.dense_bias  # type: ignore[assignment]  # which may be None
        try:
            with self._control.dense():
                yield
        finally:
            for each in self._vectors:
                each.layer.bias = each.vector

    def realised_sparsity(self) -> float | None:
        """See `Recipe`."""
        return self._counter.model_wide()

    @torch.no_grad()
    def finish_(self, model: nn.Module, sequences: Tensor) -> Outcome:
        """See `Recipe`."""
        self._control.straight_through = False
        plan = self._plan
        if any(rule.expected_sparsity for rule in plan.projections.values()):
            plan = recalibrate_(model, plan, sequences, dense_prefix=sequences.shape[1] // 2)
        named = replace(plan, allocation=f"{self.name}, {plan.allocation}")
        return Outcome(named, dict.fromkeys(self._switches, True))


RECIPE = Recover


def _bias_switches(model: Any) -> tuple[list[str], list[str]]:
    """Entries of config.json that give a model biases, and the projections that have one with them.

    Raises:
        UsageError: there are none.
    """
    config = copy.deepcopy(model.config)
    switches = [key for key in ("attention_bias", "mlp_bias") if getattr(config, key, None) is not None]
    for key in switches:
        setattr(config, key, True)
    with torch.device("meta"):
        biased = type(model)(config)
    names = [p.name for p in find_projections(model) if not p.is_output]
    found = [name for name in names if getattr(biased.get_submodule(name), "bias", None) is not None]
    if not found:
        raise UsageError(
            f"option vectors needs a model whose configuration can have biases, and {model.config.model_type} has no "
            "attention_bias or mlp_bias: train adapters (flag --lora) instead"
        )
    return switches, found
