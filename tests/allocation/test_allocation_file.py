"""Allocations as files: what is written can be edited and read back."""

import json
from pathlib import Path

import pytest
import yaml
from conftest import calibrate_tiny, save_tiny

from teal_cli.allocation import make_plan
from teal_cli.allocation.allocation_file import by_pattern, read_allocation
from teal_cli.checkpoint.calibration import Calibration
from teal_cli.errors import UsageError
from teal_cli.models.architectures import OUTPUT_SITE, Projection

NAMES = ["layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down"]
PROJECTIONS = [Projection(name, f"{name}.input", 8, 8) for name in NAMES]
OUTPUT = Projection("head", OUTPUT_SITE, 8, 32)


@pytest.fixture
def calibration(tmp_path: Path) -> Calibration:
    return calibrate_tiny(save_tiny(tmp_path / "m"))


def test_what_is_written_is_read(calibration: Calibration, tmp_path: Path) -> None:
    plan = make_plan(calibration, 0.5, "fisher")
    path = tmp_path / "mine.yaml"
    path.write_text(plan.allocation_yaml())
    again = make_plan(calibration, None, str(path))
    assert again.allocation == "mine.yaml"
    assert again.target_sparsity == pytest.approx(0.5, abs=1e-4)
    for name, entry in plan.projections.items():
        assert again.projections[name].expected_sparsity == pytest.approx(entry.expected_sparsity, abs=1e-6)
    assert {e.threshold for e in again.projections.values()} == {e.threshold for e in plan.projections.values()}


def test_later_patterns_win() -> None:
    found = by_pattern({"*": 0.5, "*.down": 0.7, "layers.1.*": 0.1}, PROJECTIONS, "x")
    assert found == {"layers.0.up": 0.5, "layers.0.down": 0.7, "layers.1.up": 0.1, "layers.1.down": 0.1}


def test_json_too(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"projections": {"*": 0.25}}))
    assert read_allocation(path, PROJECTIONS) == dict.fromkeys(NAMES, 0.25)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"projections": {"*.up": 0.5}}, r"says nothing of 2 projections, layers\.0\.down first"),
        ({"projections": {"*": 0.5, "*.dwn": 0.1}}, r"'\*\.dwn' matches no projection"),
        ({"projections": {"layers.0.upp": 0.5}}, "did you mean 'layers.0.up'"),
        ({"projections": {"*": 1.0}}, r"\*': 1\.0 is not a sparsity"),
        ({"projections": {"*": True}}, "is not a sparsity"),
        ({"projections": {"*": "half"}}, "is not a sparsity"),
        ({"projections": [0.5]}, "must hold a mapping 'projections'"),
        ({}, "must hold a mapping 'projections'"),
    ],
)
def test_mistakes_are_named(content: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(UsageError, match=message):
        read_allocation(path, PROJECTIONS)


def test_another_target_than_the_files_own_is_refused(calibration: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump({"projections": {"*": 0.25}}))
    assert make_plan(calibration, 0.25, str(path)).target_sparsity == 0.25
    with pytest.raises(UsageError, match=r"drops 0\.250 of the model, not 0\.5"):
        make_plan(calibration, 0.5, str(path))


def test_patterns_leave_the_output_layer_dense(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump({"projections": {"*": 0.5}}))
    assert read_allocation(path, [*PROJECTIONS, OUTPUT]) == {**dict.fromkeys(NAMES, 0.5), "head": 0.0}
    path.write_text(yaml.safe_dump({"projections": {"*": 0.5, "head": 0.25}}))
    assert read_allocation(path, [*PROJECTIONS, OUTPUT]) == {**dict.fromkeys(NAMES, 0.5), "head": 0.25}


def test_more_than_everything_is_refused(tmp_path: Path) -> None:
    """With the output layer's, as many weights can be left out as the blocks have."""
    calibration = calibrate_tiny(save_tiny(tmp_path / "m"), output_layer=True)
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump({"projections": {"*": 0.95, "lm_head": 0.95}}))
    with pytest.raises(UsageError, match="the output layer's with them"):
        make_plan(calibration, None, str(path))
