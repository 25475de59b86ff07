"""Greedy paths: what is reused is what would be computed, and where a path meets a target."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, VOCABULARY, build_family, build_model, calibrate_tiny, save_tiny

from teal_cli.allocation import make_plan
from teal_cli.allocation.greedy import greedy
from teal_cli.calibration.block_error import GreedyPaths, _Block, at_sparsity, measure_paths
from teal_cli.checkpoint import calibration as calibration_file
from teal_cli.checkpoint.calibration import Calibration
from teal_cli.errors import UsageError
from teal_cli.models.architectures import architecture_for, architecture_of, find_projections
from teal_cli.models.block_calls import recorded

TEXT = torch.randint(2, VOCABULARY, (2, 48), generator=torch.Generator().manual_seed(2))

DECODERS = sorted(name for name, config in FAMILIES.items() if architecture_of(config["model_type"]).kind == "causal")


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    return calibrate_tiny(save_tiny(tmp_path_factory.mktemp("m") / "m"))


def _walk(calibration: Calibration, **options: object) -> GreedyPaths:
    model = build_model("llama")
    projections, histograms = calibration.projections, calibration.histograms
    return measure_paths(model, projections, histograms, TEXT, sink_tokens=4, **options)


@pytest.fixture(scope="module")
def walked(calibration: Calibration) -> GreedyPaths:
    return _walk(calibration)


def test_at_sparsity() -> None:
    path, parameters = [[0.0, 0.0], [0.4, 0.0], [0.4, 0.8]], [100, 50]
    assert at_sparsity(path, parameters, 0.0) == [0.0, 0.0]
    assert at_sparsity(path, parameters, 0.4 * 2 / 3 / 2) == pytest.approx([0.2, 0.0])
    assert at_sparsity(path, parameters, (0.4 * 100 + 0.4 * 50) / 150) == pytest.approx([0.4, 0.4])
    with pytest.raises(ValueError, match=r"ends at 0\.53"):
        at_sparsity(path, parameters, 0.6)


@torch.no_grad()
@pytest.mark.parametrize("family", DECODERS)
def test_what_is_remembered_is_what_would_be_computed(family: str) -> None:
    """Each projection changed in turn: reusing what lies before gives the bits of running it all."""
    model = build_family(family)
    (path,) = architecture_for(model).blocks
    members = [p for p in find_projections(model) if p.name.startswith(f"{path}.1.")]
    sites = list(dict.fromkeys(p.site for p in members))
    block = model.get_submodule(path)[1]
    with recorded([block]) as calls:
        model(input_ids=TEXT, use_cache=False)
    modules = {p.name: model.get_submodule(p.name) for p in members}
    memory, fresh = (_Block(block, modules, 4, TEXT.shape) for _ in range(2))

    def call() -> torch.Tensor:
        return calls[0].on(block, calls[0].hidden)

    thresholds = dict.fromkeys(modules, 0.05)
    memory.run(call, thresholds, set())
    memory.keep()
    for p in members:
        changed = thresholds | {p.name: 0.3}
        unchanged = {q.name for q in members if q != p and sites.index(q.site) <= sites.index(p.site)}
        expected = fresh.run(call, changed, set())
        assert torch.equal(memory.run(call, changed, unchanged), expected), p.name
        assert not torch.equal(expected, fresh.run(call, thresholds, set())), p.name
    assert all("forward" not in module.__dict__ for module in block.modules())


def test_paths_rise_and_reach_far(walked: GreedyPaths, calibration: Calibration) -> None:
    assert list(walked.paths) == ["model.layers.0", "model.layers.1"]
    for block, path in walked.paths.items():
        assert not path[0].any()
        assert (path.diff(dim=0) >= 0).all()
        assert ((path.diff(dim=0) > 0).sum(1) == 1).all()  # one projection a step
        parameters = [p.parameters for p in calibration.projections if p.name.startswith(f"{block}.")]
        at_sparsity(path.tolist(), parameters, 0.85)


def test_trying_only_who_may_win_finds_nearly_the_same(walked: GreedyPaths, calibration: Calibration) -> None:
    all_tried = _walk(calibration, lazy=False)
    assert walked.forwards < 0.6 * all_tried.forwards < walked.naive_forwards
    for block, path in walked.paths.items():
        parameters = [p.parameters for p in calibration.projections if p.name.startswith(f"{block}.")]
        lazy, full = (at_sparsity(p.tolist(), parameters, 0.5) for p in (path, all_tried.paths[block]))
        assert max(abs(a - b) for a, b in zip(lazy, full, strict=True)) < 0.3
        assert sum(abs(a - b) for a, b in zip(lazy, full, strict=True)) / 7 < 0.1


def test_sparse_inputs_change_later_blocks_only(walked: GreedyPaths, calibration: Calibration) -> None:
    other = _walk(calibration, inputs="sparse", sparsity=0.6)
    assert torch.equal(other.paths["model.layers.0"], walked.paths["model.layers.0"])
    assert not torch.equal(other.paths["model.layers.1"], walked.paths["model.layers.1"])


@pytest.mark.parametrize("target", [0.0, 0.25, 0.5, 0.8])
def test_every_block_meets_the_target(target: float, walked: GreedyPaths, calibration: Calibration) -> None:
    found = greedy(replace(calibration, paths=walked.paths), target)
    for block in walked.paths:
        members = [p for p in calibration.projections if p.name.startswith(f"{block}.")]
        dropped = sum(found[p.name] * p.parameters for p in members) / sum(p.parameters for p in members)
        assert dropped == pytest.approx(target, abs=1e-6)


def test_saved_and_read_again(walked: GreedyPaths, calibration: Calibration, tmp_path: Path) -> None:
    whole = replace(calibration, paths=walked.paths)
    calibration_file.save(whole, tmp_path)
    again = calibration_file.load(tmp_path)
    assert greedy(again, 0.5) == greedy(whole, 0.5)
    assert not whole.merged(whole).paths  # steps of two texts cannot be added up


def test_what_cannot_be_done_is_said(walked: GreedyPaths, calibration: Calibration) -> None:
    with pytest.raises(UsageError, match="--greedy-tokens"):
        make_plan(calibration, 0.5, "greedy")
    with pytest.raises(UsageError, match="does not reach sparsity 0.95"):
        make_plan(replace(calibration, paths=walked.paths), 0.95, "greedy")
