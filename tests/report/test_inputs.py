"""What a report finds in a run folder, and which export it is about."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from teal_cli.report.inputs import read_material, when
from teal_cli.report.layers import grid_of, places_of
from teal_cli.report.summary import how_to_measure


@pytest.fixture
def own_run(finished_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished_run, tmp_path / "runs" / "tiny")


def test_results_are_known_by_what_they_hold(own_run: Path) -> None:
    (own_run / "eval.json").rename(own_run / "monday.json")
    (own_run / "notes.json").write_text('["not", "ours"]')
    (own_run / "broken.json").write_text("{")
    found = read_material(own_run)
    assert [(each.file.name, each.kind) for each in found.results] == [
        ("bench.json", "bench"),
        ("generate.json", "generate"),
        ("monday.json", "eval"),
    ]
    # The same result from elsewhere is not told twice.
    shutil.copy(own_run / "monday.json", "again.json")
    assert len(read_material(own_run, [Path("again.json")]).results) == 3


def test_the_export_of_the_recipe_is_in_focus(own_run: Path) -> None:
    assert read_material(own_run).focus.name == "fisher-0.50"
    stage = json.loads((own_run / "export.json").read_text())
    (own_run / "export.json").write_text(json.dumps(stage | {"folder": "runs/tiny/uniform-0.30"}))
    assert read_material(own_run).focus.name == "uniform-0.30"
    (own_run / "export.json").unlink()
    # Nearest to half; of those the first that was evaluated.
    assert read_material(own_run).focus.name == "fisher-0.50"
    quality = json.loads((own_run / "eval.json").read_text())
    quality["runs"] = [run for run in quality["runs"] if run["sparse"]["allocation"] == "uniform"]
    (own_run / "eval.json").write_text(json.dumps(quality))
    assert read_material(own_run).focus.name == "uniform-0.50"


def test_realised_sparsity_is_of_this_model_and_plan(own_run: Path) -> None:
    found = read_material(own_run)
    quality = json.loads((own_run / "eval.json").read_text())
    for export in found.exports:
        (run,) = [
            run
            for run in quality["runs"]
            if export.label == f"{run['sparse']['allocation']}, {run['sparse']['target_sparsity']:.2f}"
        ]
        assert found.realised(export).model_wide == run["sparse"]["realised_sparsity"]
        assert found.realised(export).by_projection == run["realised_by_projection"]
    (own_run / "eval.json").write_text(json.dumps(quality | {"model": "another"}))
    found = read_material(own_run)
    assert all(found.realised(export) is None for export in found.exports)


def test_when_something_was_made(own_run: Path) -> None:
    file = own_run / "eval.json"
    assert when(file, {"finished": "2026-01-31T13:05:59+01:00"}) == "2026-01-31 12:05 UTC"
    os.utime(file, (86400, 86400))
    assert when(file, {}) == "1970-01-02 00:00 UTC"


def test_commands_that_make_what_is_absent(own_run: Path) -> None:
    found = read_material(own_run)
    model = json.loads((own_run / "eval.json").read_text())["config"]["model"]
    assert how_to_measure("bench", found) == (
        f"teal bench --model {model} --sparsity 0.5 --allocation fisher --runs {own_run.parent} "
        f"--json {own_run}/bench.json"
    )
    for file in own_run.glob("*.json"):
        if file.name != "calibration.json":
            file.unlink()
    for folder in own_run.glob("*-0.*"):
        shutil.rmtree(folder)
    os.chdir(own_run.parents[1])
    found = read_material(Path("runs/tiny"))
    assert how_to_measure("export", found) == "teal export --model tiny"
    assert how_to_measure("eval", found) == "teal eval --model tiny --json runs/tiny/eval.json"


def test_a_plan_that_no_flag_makes_is_measured_as_its_checkpoint(own_run: Path, tmp_path: Path) -> None:
    alone = shutil.copytree(own_run / "uniform-0.30", tmp_path / "elsewhere" / "mine")
    found = read_material(alone)
    export = found.focus
    other = replace(export, plan=replace(export.plan, allocation="intrinsic and uniform"))
    found = replace(found, focus=other)
    assert how_to_measure("eval", found) == f"teal eval --model {alone}"


def test_commands_of_a_checkpoint_alone(own_run: Path, tmp_path: Path) -> None:
    """Each with the flags that its verb has."""
    alone = shutil.copytree(own_run / "uniform-0.30", tmp_path / "elsewhere" / "mine")
    config = json.loads((alone / "config.json").read_text())
    found = read_material(alone)
    assert how_to_measure("calibrate", found) == "teal calibrate --model tiny"
    assert how_to_measure("eval", found) == "teal eval --model tiny --sparsity 0.3 --allocation uniform"
    config["quantization_config"] |= {"version": 2, "quantization": {"projections": "int4:32", "output": "lm_head"}}
    del config["quantization_config"]["content_sha256"]  # as an older version wrote it
    (alone / "config.json").write_text(json.dumps(config))
    found = read_material(alone)
    assert how_to_measure("calibrate", found) == "teal calibrate --model tiny --quantise int4:32 --quantise-output"


def test_places() -> None:
    """Kinds are as short as they can be; layers of several stacks are told apart."""
    names = ["m.0.a_proj", "m.0.b_proj", "m.1.b_proj", "lm_head"]
    grid = grid_of(names)
    assert (grid.labels, grid.kinds) == (["0", "1"], ["a", "b"])
    assert grid.rows({"m.0.a_proj": 1.0, "m.1.b_proj": 2.0, "lm_head": 3.0}) == [[1.0, None], [None, 2.0]]
    gpt2 = [f"transformer.h.11.{path}" for path in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    places = places_of(gpt2)
    assert [place.kind for place in places.values()] == ["c_attn", "attn.c", "c_fc", "mlp.c"]
    assert {place.layer for place in places.values()} == {11}
    bert = ["attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense"]
    kinds = [place.kind for place in places_of(f"encoder.layer.0.{path}" for path in bert).values()]
    assert kinds == ["query", "attention.output.dense", "intermediate.dense", "output.dense"]
    t5 = ["encoder.block.0.layer.0.SelfAttention.q", "encoder.block.0.layer.1.DenseReluDense.wo"]
    t5 += ["decoder.block.0.layer.1.EncDecAttention.q", "decoder.block.0.layer.2.DenseReluDense.wo"]
    grid = grid_of(t5)
    assert (grid.labels, grid.kinds) == (["encoder 0", "decoder 0"], ["SelfAttention.q", "wo", "EncDecAttention.q"])
    assert grid.names == [[t5[0], t5[1], None], [None, t5[3], t5[2]]]
    experts = [f"model.layers.0.experts.{number}.w1" for number in (0, 1)]
    assert [place.kind for place in places_of(experts).values()] == ["0.w1", "1.w1"]
