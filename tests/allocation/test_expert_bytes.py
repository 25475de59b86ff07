"""Experts count by what a token reads of them: equal sparsity is equal bytes a token, however it is spread."""

import json
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, build_family, calibrate_tiny, save_tiny
from tiny_configs import ALL_MIXTURES

from teal_cli.allocation import make_plan
from teal_cli.allocation.cost import time_saved, weights_saved
from teal_cli.calibration.block_error import measure_paths
from teal_cli.checkpoint import calibration as calibration_file
from teal_cli.checkpoint.calibration import Calibration
from teal_cli.models.architectures import block_weights, find_projections
from teal_cli.sparse.weight_bytes import weight_bytes_per_token


def _calibration(folder: Path, family: str) -> Calibration:
    calibration = calibrate_tiny(save_tiny(folder, family))
    text = torch.randint(2, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(2))
    found = measure_paths(build_family(family), calibration.projections, calibration.histograms, text, sink_tokens=4)
    calibration.paths.update(found.paths)
    return calibration


@pytest.mark.parametrize("family", ALL_MIXTURES)
def test_equal_sparsity_is_equal_bytes_a_token(family: str, tmp_path: Path) -> None:
    calibration, model = _calibration(tmp_path / "m", family), build_family(family)
    dense = weight_bytes_per_token(model, {})
    of_blocks = 4 * block_weights(calibration.projections)
    for allocation in ("uniform", "greedy", "fisher"):
        plan = make_plan(calibration, 0.4, allocation)
        realised = {name: rule.expected_sparsity or 0.0 for name, rule in plan.projections.items()}
        saved = dense - weight_bytes_per_token(model, realised)
        assert saved == pytest.approx(0.4 * of_blocks, rel=0.01), allocation


@pytest.mark.parametrize("family", ALL_MIXTURES)
def test_what_a_token_reads_of_experts(family: str) -> None:
    model = build_family(family)
    chosen = int(model.config.num_experts_per_tok)  # type: ignore[union-attr, arg-type]
    experts = [projection for projection in find_projections(model) if projection.copies > 1]
    assert len(experts) in (2, 4)
    for projection in experts:
        assert projection.chosen == chosen
        assert projection.weights_read * projection.copies == projection.parameters * chosen
    others = [projection for projection in find_projections(model) if projection.copies == 1]
    assert all(projection.weights_read == projection.parameters for projection in others)


def test_each_chosen_expert_takes_its_time(tmp_path: Path) -> None:
    """Where times go with weights, time and bytes buy the same."""
    projections = find_projections(build_family("mixtral"))
    kernels = [
        {
            "out_features": p.out_features,
            "in_features": p.in_features,
            "realised_sparsity": s,
            "microseconds": {"median": p.in_features * p.out_features * (1 - s)},
        }
        for p in projections
        for s in (0.0, 0.5, 0.8)
    ]
    (tmp_path / "t.json").write_text(json.dumps({"kernels": kernels}))
    by_time, by_bytes = time_saved(tmp_path / "t.json", projections), weights_saved(projections)
    for p in projections:
        assert by_time[p.name].at(0.5) == pytest.approx(by_bytes[p.name].at(0.5))


def test_a_calibration_keeps_how_many_are_chosen(tmp_path: Path) -> None:
    calibration = calibrate_tiny(save_tiny(tmp_path / "m", "qwen3_moe"))
    calibration_file.save(calibration, tmp_path / "run")
    assert calibration_file.load(tmp_path / "run").projections == calibration.projections
    assert {p.chosen for p in calibration.projections} == {2, None}
