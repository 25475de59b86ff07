"""Buying time in place of bytes, and limits."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import calibrate_tiny, save_tiny

from teal_cli.allocation.cost import Saving, time_saved
from teal_cli.allocation.fisher import fisher
from teal_cli.checkpoint.calibration import Calibration
from teal_cli.errors import ArtefactError, UsageError


@pytest.fixture
def calibration(tmp_path: Path) -> Calibration:
    return calibrate_tiny(save_tiny(tmp_path / "m"))


def _kernels(shapes: dict[tuple[int, int], dict[float, float]]) -> list[dict[str, Any]]:
    return [
        {"out_features": out, "in_features": n, "realised_sparsity": s, "microseconds": {"median": t}}
        for (out, n), times in shapes.items()
        for s, t in times.items()
    ]


def _table(path: Path, calibration: Calibration, times: dict[float, float], faster: str = "") -> Path:
    """A table in which time goes with weights, but projections called `faster` save eight times as much."""
    shapes = {}
    for p in calibration.projections:
        scale = p.parameters * (8.0 if faster and p.name.endswith(faster) else 1.0)
        shapes[p.out_features, p.in_features] = {s: t * scale for s, t in times.items()}
    path.write_text(json.dumps({"kernels": _kernels(shapes)}))
    return path


def test_saving_there_and_back() -> None:
    saving = Saving((0.0, 0.25, 0.5, 1.0), (0.0, 0.0, 3.0, 5.0))
    assert [saving.at(s) for s in (0.0, 0.2, 0.375, 0.5, 0.75)] == [0.0, 0.0, 1.5, 3.0, 4.0]
    assert saving.sparsity_for(0.0) == 0.0
    for s in (0.3, 0.5, 0.9):
        assert saving.sparsity_for(saving.at(s)) == pytest.approx(s)


def test_times_in_proportion_to_bytes_change_nothing(calibration: Calibration, tmp_path: Path) -> None:
    table = _table(tmp_path / "t.json", calibration, {0.0: 1.0, 0.5: 0.5, 0.8: 0.2})
    by_time = fisher(calibration, 0.5, savings=time_saved(table, calibration.projections))
    by_bytes = fisher(calibration, 0.5)
    for name, sparsity in by_bytes.items():
        assert by_time[name] == pytest.approx(sparsity, abs=1e-6)


def test_time_is_bought_where_it_is_cheap(calibration: Calibration, tmp_path: Path) -> None:
    table = _table(tmp_path / "t.json", calibration, {0.0: 1.0, 0.5: 0.6, 0.8: 0.3}, faster="down_proj")
    savings = time_saved(table, calibration.projections)
    found = fisher(calibration, 0.5, savings=savings)
    wanted = sum(saving.at(0.5) for saving in savings.values())
    assert sum(savings[name].at(s) for name, s in found.items()) == pytest.approx(wanted, rel=1e-6)
    before = fisher(calibration, 0.5)
    others = [name for name in found if not name.endswith("down_proj")]
    assert sum(found[name] for name in others) < 0.9 * sum(before[name] for name in others)


def test_a_whole_sites_time_is_shared_out(calibration: Calibration, tmp_path: Path) -> None:
    sites: dict[str, list[Any]] = {}
    for p in calibration.projections:
        sites.setdefault(p.site, []).append(p)
    shapes = {
        (sum(p.out_features for p in members), members[0].in_features): {0.0: 8.0, 0.5: 4.0}
        for members in sites.values()
    }
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"kernels": _kernels(shapes)}))
    savings = time_saved(path, calibration.projections)
    for members in sites.values():
        assert sum(savings[p.name].at(0.5) for p in members) == pytest.approx(4.0)


def test_slower_below_break_even_is_not_bought(calibration: Calibration, tmp_path: Path) -> None:
    table = _table(tmp_path / "t.json", calibration, {0.0: 1.0, 0.2: 1.1, 0.5: 0.6, 0.8: 0.3})
    found = fisher(calibration, 0.3, savings=time_saved(table, calibration.projections))
    assert all(s == 0.0 or s > 0.2 for s in found.values())


@pytest.mark.parametrize(
    ("content", "message"),
    [({}, "is damaged"), ({"kernels": []}, "has no times of .*q_proj"), ({"kernels": [{}]}, "is damaged")],
)
def test_tables_that_do_not_fit(content: object, message: str, calibration: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ArtefactError, match=message):
        time_saved(path, calibration.projections)


def test_limits_hold_and_the_target_too(calibration: Calibration) -> None:
    names = [p.name for p in calibration.projections]
    limits = {name: (0.0, 0.3) for name in names if ".layers.0." in name} | {names[-1]: (0.9, 0.95)}
    found = fisher(calibration, 0.5, limits=limits)
    assert all(least <= found[name] <= most + 1e-9 for name, (least, most) in limits.items())
    weights = {p.name: p.parameters for p in calibration.projections}
    assert sum(found[n] * w for n, w in weights.items()) / sum(weights.values()) == pytest.approx(0.5, abs=1e-9)


@pytest.mark.parametrize(("limit", "message"), [((0.6, 0.9), "ask for more"), ((0.0, 0.4), "within the limits")])
def test_limits_that_leave_no_way(limit: tuple[float, float], message: str, calibration: Calibration) -> None:
    limits = {p.name: limit for p in calibration.projections}
    with pytest.raises(UsageError, match=message):
        fisher(calibration, 0.5, limits=limits)
