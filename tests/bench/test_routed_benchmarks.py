"""The benchmarks of routed MLPs, on tiny models."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import TINY_CONFIGS, save_tiny

from teal_cli.api import adapt_model, calibrate
from teal_cli.models.aliases import Alias, require_alias

_BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def _module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(_BENCHMARKS))
    return __import__(name)


def _run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


def test_tokens_of_each_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, out = _module("routed_tokens", monkeypatch), tmp_path / "out.json"
    shape = {key: value for key, value in TINY_CONFIGS["llama"].items() if key != "model_type"}
    known = require_alias("llama-2-7b")

    def tiny(name: str) -> Alias:
        return Alias(**{**vars(known), "name": name, "shape": {**known.shape, **shape}})

    monkeypatch.setattr(module, "require_alias", tiny)
    monkeypatch.setattr(module, "PROMPT", 16)
    arguments = ("--models", "tiny", "--group", 4, "--shares", 0.6, "--device", "cpu", "--dtype", "float32")
    _run(module, monkeypatch, "--out", out, *arguments, "--new-tokens", 2, "--repeats", 1, "--rows", "1,2")
    runs = json.loads(out.read_text())["runs"]
    assert [(run["rows"], run["way"]) for run in runs[:4]] == [
        (1, "dense"),
        (1, "routed, all computed"),
        (1, "routed"),
        (1, "gate first"),
    ]
    assert len(runs) == 8
    for run in runs:
        assert run["tokens_per_second"]["median"] > 0
        if run["way"] in ("routed", "gate first"):
            assert 0.4 < run["realised"]["neurons"] < 0.8


def test_tokens_of_adapted_models_beside_their_dense_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A TEAL checkpoint by its thresholds, an ordinary model by its zeros."""
    module, out = _module("adapted_tokens", monkeypatch), tmp_path / "out.json"
    save_tiny(tmp_path / "dense")
    shared = {"runs": str(tmp_path / "runs"), "device": "cpu", "dataset": "sotu", "tokens": 64, "seq_len": 16}
    own = {"batch_size": 2, "held_out_tokens": 32}
    calibrate(tmp_path / "dense", **shared, sensitivity_tokens=16)
    for name, recipe, more in (("recovered", "recover", {"sparsity": 0.5}), ("zeros", "relu", {})):
        adapt_model(tmp_path / "dense", recipe, out=str(tmp_path / name), **shared, **own, **more)
    folders = [f"{name}={tmp_path / name}" for name in ("recovered", "zeros")]
    sizes = ("--model", tmp_path / "dense", "--device", "cpu", "--new-tokens", 4, "--prompt-tokens", 8, "--repeats", 1)
    _run(module, monkeypatch, *folders, "--out", out, *sizes)
    dense, recovered, zeros = json.loads(out.read_text())["runs"]
    assert [run["what"] for run in (dense, recovered, zeros)] == ["dense", "recovered", "zeros"]
    assert dense["realised"] is None
    assert dense["speedup"]["median"] == 1
    assert recovered["realised"]["model_wide"] > 0.2
    assert zeros["realised"]["neurons"] > 0.2
