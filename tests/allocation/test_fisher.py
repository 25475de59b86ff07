"""Spreading sparsity by cost: hulls, the target, and that no other spread of the same curves is cheaper."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import calibrate_tiny, save_tiny

from teal_cli.allocation import make_plan
from teal_cli.allocation.fisher import curve, fisher, fisher_site, hull
from teal_cli.calibration import histogram, sensitivity
from teal_cli.checkpoint import calibration as calibration_file
from teal_cli.checkpoint.calibration import Calibration
from teal_cli.errors import ArtefactError, UsageError


@pytest.fixture
def calibration(tmp_path: Path) -> Calibration:
    return calibrate_tiny(save_tiny(tmp_path / "m"))


def _model_wide(calibration: Calibration, sparsity: dict[str, float]) -> float:
    weights = {p.name: p.parameters for p in calibration.projections}
    return sum(sparsity[name] * weight for name, weight in weights.items()) / sum(weights.values())


def _cost(calibration: Calibration, sparsity: dict[str, float]) -> float:
    """On the hulls."""
    total = 0.0
    for p in calibration.projections:
        points = hull(curve(calibration.histograms[p.site], calibration.sensitivities[p.name]))
        for (s_0, cost_0), (s_1, cost_1) in itertools.pairwise(points):
            if s_0 <= sparsity[p.name] <= s_1:
                total += cost_0 + (cost_1 - cost_0) * (sparsity[p.name] - s_0) / (s_1 - s_0)
                break
    return total


def test_hull() -> None:
    points = [(0.0, 0.0), (0.1, 3.0), (0.2, 1.0), (0.3, 2.0), (0.5, 2.5), (0.7, 9.0)]
    assert hull(points) == [(0.0, 0.0), (0.5, 2.5), (0.7, 9.0)]  # (0.2, 1.0) lies on the first piece
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(hull(points))]
    assert slopes == sorted(slopes)


def test_curve_starts_at_nothing_and_rises_in_sparsity(calibration: Calibration) -> None:
    projection = calibration.projections[0]
    points = curve(calibration.histograms[projection.site], calibration.sensitivities[projection.name])
    assert points[0] == (0.0, 0.0)
    shares = [share for share, _ in points]
    assert shares == sorted(set(shares))
    assert 0.9 < shares[-1] <= 0.99


@pytest.mark.parametrize("target", [0.0, 0.1, 0.4, 0.5, 0.65, 0.9])
def test_the_target_is_met_and_nothing_is_cheaper(calibration: Calibration, target: float) -> None:
    sparsity = fisher(calibration, target)
    assert _model_wide(calibration, sparsity) == pytest.approx(target, abs=1e-9)
    assert all(0.0 <= value <= 0.99 for value in sparsity.values())
    cost = _cost(calibration, sparsity)
    assert cost <= _cost(calibration, dict.fromkeys(sparsity, target)) * (1 + 1e-9)
    # Nor by moving a little from any projection to any other.
    weights = {p.name: p.parameters for p in calibration.projections}
    for giver, taker in itertools.permutations(list(sparsity)[:7], 2):
        step = 1e-3 * weights[giver]
        moved = sparsity | {
            giver: sparsity[giver] - step / weights[giver],
            taker: sparsity[taker] + step / weights[taker],
        }
        if moved[giver] >= 0.0 and moved[taker] <= 0.9:
            assert _cost(calibration, moved) >= cost * (1 - 1e-9)


@pytest.mark.parametrize("target", [0.0, 0.4, 0.65])
def test_one_sparsity_a_site(calibration: Calibration, target: float) -> None:
    """No spread of one sparsity a site is cheaper, and one a projection is never dearer."""
    sparsity = fisher_site(calibration, target)
    assert _model_wide(calibration, sparsity) == pytest.approx(target, abs=1e-9)
    sites: dict[str, set[float]] = {}
    for p in calibration.projections:
        sites.setdefault(p.site, set()).add(sparsity[p.name])
    assert all(len(values) == 1 for values in sites.values())
    assert len(set(sparsity.values())) > 3 or target == 0.0
    uniform = dict.fromkeys(sparsity, target)
    assert _cost(calibration, fisher(calibration, target)) <= _cost(calibration, sparsity) * (1 + 1e-9)
    assert _cost(calibration, sparsity) < _cost(calibration, uniform) or target == 0.0
    plan = make_plan(calibration, target, "fisher-site")
    assert plan.allocation == "fisher-site"
    assert {name: entry.expected_sparsity for name, entry in plan.projections.items()} == sparsity


def test_costs_decide(calibration: Calibration) -> None:
    cheap, dear = (p.name for p in calibration.projections[:2])
    calibration.sensitivities[cheap] = calibration.sensitivities[cheap] * 1e-6
    calibration.sensitivities[dear] = calibration.sensitivities[dear] * 1e6
    sparsity = fisher(calibration, 0.5)
    assert sparsity[cheap] > 0.95
    assert sparsity[dear] < 0.05


def test_the_plan_has_the_thresholds_of_the_histograms(calibration: Calibration) -> None:
    plan = make_plan(calibration, 0.5, "fisher")
    assert plan.allocation == "fisher"
    for p in calibration.projections:
        entry = plan.projections[p.name]
        share = histogram.sparsity_at(calibration.histograms[p.site], entry.threshold)
        assert share == pytest.approx(entry.expected_sparsity, abs=0.01)


@pytest.mark.parametrize("spread", [fisher, fisher_site])
def test_without_sensitivities(calibration: Calibration, spread: Any) -> None:
    calibration.sensitivities.clear()
    with pytest.raises(UsageError, match="--sensitivity-tokens"):
        spread(calibration, 0.5)


def test_beyond_reach(calibration: Calibration) -> None:
    with pytest.raises(UsageError, match=r"does not reach sparsity 0\.995"):
        fisher(calibration, 0.995)


def test_sensitivities_are_kept_and_merged(calibration: Calibration, tmp_path: Path) -> None:
    calibration_file.save(calibration, tmp_path / "run")
    loaded = calibration_file.load(tmp_path / "run")
    assert loaded.info == calibration.info
    for name, squares in calibration.sensitivities.items():
        assert torch.equal(loaded.sensitivities[name], squares)
    merged = loaded.merged(calibration)
    assert merged.info.sensitivity_tokens == 2 * calibration.info.sensitivity_tokens
    without = Calibration(
        replace(calibration.info, sensitivity_tokens=0), calibration.projections, calibration.histograms
    )
    for name, squares in calibration.sensitivities.items():
        assert torch.equal(merged.sensitivities[name], 2 * squares)
        assert torch.equal(without.merged(calibration).sensitivities[name], squares)
    assert fisher(merged, 0.5) == pytest.approx(fisher(calibration, 0.5))


def test_sensitivities_of_other_projections_are_refused(calibration: Calibration, tmp_path: Path) -> None:
    name = calibration.projections[0].name
    calibration.sensitivities["another"] = calibration.sensitivities.pop(name)
    with pytest.raises(ArtefactError, match="sensitivities"):
        calibration_file.save(calibration, tmp_path / "run")
    calibration.sensitivities[name] = torch.zeros(sensitivity.BINS - 1, dtype=torch.float64)
    del calibration.sensitivities["another"]
    with pytest.raises(ArtefactError, match="wrong size"):
        calibration_file.save(calibration, tmp_path / "run")
    assert not (tmp_path / "run").exists()
