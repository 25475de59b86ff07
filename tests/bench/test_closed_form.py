"""Corrections in closed form, which a benchmark tries: they lower the error that they are to lower."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_model
from tiny_configs import VOCABULARY

from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.checkpoint.rules import Threshold
from teal_cli.models.architectures import find_projections
from teal_cli.sparse import SparsityCounter, control_of, recalibrate_, sparse_layers, sparsify_

KINDS = ("weights", "inputs", "outputs", "vector")


@pytest.fixture
def trial(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return __import__("closed_form")


def dropped_and_kept() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, inputs that go together, and those that are kept."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=generator) @ torch.randn(6, 12, generator=generator) + 1.0
    return torch.randn(5, 12, generator=generator), x, torch.where(x.abs() > 1.5, x, 0.0)


def sums_of(trial: Any, weight: torch.Tensor, x: torch.Tensor, kept: torch.Tensor) -> Any:
    gone = (x - kept) @ weight.T
    return trial.Sums((kept.T @ kept).double(), (gone.T @ kept).double(), gone.sum(0).double(), len(x))


def error_of(weight: torch.Tensor, x: torch.Tensor, kept: torch.Tensor, change: Any, vector: Any) -> float:
    product = kept @ (weight + change).T + (0 if vector is None else vector)
    return float((x @ weight.T - product).square().sum())


@pytest.mark.parametrize("kind", KINDS)
def test_a_correction_is_the_best_of_its_kind(trial: Any, kind: str) -> None:
    """The error is lower than without it, and than with a little more or less of it."""
    weight, x, kept = dropped_and_kept()
    change, vector = trial.Correction(kind, 0.0 if kind != "weights" else 1e-9).of(
        weight, sums_of(trial, weight, x, kept)
    )
    found = error_of(weight, x, kept, change, vector)
    assert found < 0.999 * error_of(weight, x, kept, 0 * change, None)
    for factor in (0.95, 1.05):
        others = factor * change, None if vector is None else factor * vector
        assert found < error_of(weight, x, kept, *others)


@pytest.mark.parametrize("kind", KINDS)
def test_a_great_ridge_changes_nothing(trial: Any, kind: str) -> None:
    weight, x, kept = dropped_and_kept()
    change, vector = trial.Correction(kind, 1e12).of(weight, sums_of(trial, weight, x, kept))
    assert change.abs().max() < 1e-9
    assert vector is None or vector.abs().max() < 1e-9


def test_rank_is_kept_and_costs_error(trial: Any) -> None:
    weight, x, kept = dropped_and_kept()
    sums, errors = sums_of(trial, weight, x, kept), []
    for rank in (1, 3, 0):
        change, _ = trial.Correction("weights", 1e-6, rank).of(weight, sums)
        assert not rank or torch.linalg.matrix_rank(change, rtol=1e-4) == rank
        errors.append(error_of(weight, x, kept, change, None))
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("in_turn", [True, False])
def test_blocks_of_a_model_come_nearer_to_the_dense_ones(trial: Any, in_turn: bool) -> None:
    """On the text of the fit; and thresholds measured again keep the sparsity."""
    model = build_model("llama")
    dense = copy.deepcopy(model)
    rules = {p.name: Threshold(0.3, 0.5) for p in find_projections(model) if not p.is_output}
    plan = SparsityPlan("uniform", 0.5, rules)
    sparsify_(model, plan)
    ids = torch.randint(2, VOCABULARY, (24, 32), generator=torch.Generator().manual_seed(1))
    prefixes = torch.arange(24) % 16
    plan = recalibrate_(model, plan, ids, dense_prefix=0)

    def error() -> float:
        with torch.no_grad(), control_of(model).masked(prefixes):
            return float((model(ids).logits - dense(ids).logits).square().mean())

    before = error()
    trial.Fitter(model, dense, ids, prefixes, at_once=8).run(
        trial.Fit(trial.Correction("weights", 0.01), in_turn=in_turn)
    )
    assert error() < 0.95 * before
    recalibrate_(model, plan, ids, dense_prefix=0)
    with torch.no_grad(), control_of(model).masked(0), control_of(model).counting(SparsityCounter()) as counter:
        model(ids)
    assert counter.model_wide() == pytest.approx(0.5, abs=0.02)
    assert all(layer.rule.expected_sparsity == 0.5 for layer in sparse_layers(model).values() if not layer.is_output)
