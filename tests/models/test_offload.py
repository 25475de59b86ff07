"""Offloaded models measure what they measure in memory."""

import importlib.util
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, build_model, save_tiny

from teal_cli.checkpoint import calibration as calibration_file
from teal_cli.checkpoint.calibration import Calibration
from teal_cli.cli import run
from teal_cli.models.offload import computing_device, offload_, places_of, spread_


def test_weights_are_elsewhere_between_layers() -> None:
    model, same = build_model("llama"), build_model("llama")
    offload_(model, torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert computing_device(model) == computing_device(same) == torch.device("cpu")
    ids = torch.arange(2, 50)[None] % VOCABULARY
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, same(input_ids=ids).logits)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_blocks_on_several_devices_measure_the_same(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two devices one is a disk, from which a block's weights come when it runs: hooks move states all the same."""
    tiny = save_tiny(tmp_path / "tiny")
    flags = ["--dataset", str(corpus), "--tokens", "256", "--seq-len", "64", "--greedy-tokens", "64"]
    spread: list[dict[str, str]] = []

    def on_two(model: torch.nn.Module) -> None:
        devices = {"model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "disk", "lm_head": "cpu"}
        spread.append({"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", **devices})
        spread_(model, spread[0], tmp_path / "disk")

    monkeypatch.setattr("teal_cli.steps.calibrate.spread_", on_two)
    found: list[Calibration] = []
    for extra in ([], ["--device-map", "auto"]):
        assert run(["calibrate", "--model", str(tiny), *flags, *extra, "--out", "run"]) == 0
        found.append(calibration_file.load(Path("run")))
    assert len(spread) == 1
    here, away = found
    for name in ("histograms", "sensitivities", "paths"):
        for key, values in getattr(away, name).items():
            torch.testing.assert_close(values, getattr(here, name)[key], rtol=0, atol=0)


@pytest.mark.parametrize("to_train", [False, True])
def test_gpus_have_equal_parts(to_train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Filled one after the other, the first would have no room for what the model computes."""
    free = {0: 1 << 30, 1: 1 << 30, "cpu": 1 << 30}
    monkeypatch.setattr("accelerate.utils.modeling.get_max_memory", lambda given=None: given or dict(free))
    places = places_of(build_model("llama-bias"), to_train=to_train)
    assert set(places.values()) == {0, 1}


def test_one_device_is_enough_for_a_small_model() -> None:
    model, same = build_model("llama"), build_model("llama")
    spread_(model)
    ids = torch.arange(2, 50)[None] % VOCABULARY
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits.cpu(), same(input_ids=ids).logits)


@pytest.mark.parametrize("family", ["llama", "llama-bias"])  # the second has tied embeddings
@pytest.mark.parametrize("quantise", [[], ["--quantise", "int4:32", "--quantise-output"]])
def test_calibrations_are_the_same(family: str, quantise: list[str], corpus: Path, tmp_path: Path) -> None:
    """Histograms, sensitivities and greedy paths, of the output layer too."""
    tiny = save_tiny(tmp_path / "tiny", family)
    flags = ["--dataset", str(corpus), "--tokens", "256", "--seq-len", "64", "--greedy-tokens", "64", *quantise]
    found: list[Calibration] = []
    for extra in ([], ["--offload"]):
        assert run(["calibrate", "--model", str(tiny), "--output-layer", *flags, *extra, "--out", "run"]) == 0
        found.append(calibration_file.load(Path("run")))
    here, away = found
    assert here.info.device == away.info.device == "cpu"
    assert here.info.weights == away.info.weights
    assert here.projections == away.projections
    for name in ("histograms", "sensitivities", "paths"):
        expected = getattr(here, name)
        assert expected
        assert set(getattr(away, name)) == set(expected)
        for key, values in getattr(away, name).items():
            torch.testing.assert_close(values, expected[key], rtol=0, atol=0)


@pytest.mark.parametrize("family", ["gpt2", "phi3", "t5", "bert"])
def test_other_kinds_of_layers(family: str, corpus: Path, tmp_path: Path) -> None:
    """Conv1D, fused projections, encoder-decoders and encoders."""
    tiny = save_tiny(tmp_path / "tiny", family)
    flags = ["--dataset", str(corpus), "--tokens", "128", "--seq-len", "64"]
    for extra in ([], ["--offload"]):
        assert run(["calibrate", "--model", str(tiny), *flags, *extra, "--out", "-".join(["run", *extra])]) == 0
    here, away = (calibration_file.load(Path(name)) for name in ("run", "run---offload"))
    assert all(torch.equal(counts, away.histograms[site]) for site, counts in here.histograms.items())
    for name, squares in here.sensitivities.items():
        torch.testing.assert_close(away.sensitivities[name], squares, rtol=1e-6, atol=0)


def test_what_it_is_not_for(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = save_tiny(tmp_path / "experts", "mixtral")
    assert run(["calibrate", "--model", str(experts), "--offload", "--tokens", "64", "--seq-len", "64"]) == 2
    assert "does not know stacked experts" in capsys.readouterr().err
    assert run(["calibrate", "--model", str(tiny), "--offload", "--dataset", "self"]) == 2
    assert "reads all weights for each token of dataset self" in capsys.readouterr().err
    original = importlib.util.find_spec
    monkeypatch.setattr(
        "teal_cli.models.offload.find_spec", lambda name: None if name == "accelerate" else original(name)
    )
    flags = ["--tokens", "64", "--seq-len", "64"]
    assert run(["calibrate", "--model", str(tiny), "--offload", *flags]) == 4
    assert "pip install 'teal-cli[offload]'" in capsys.readouterr().err


def test_what_cannot_be_is_known_before_the_model_is_loaded(
    tiny: Path, corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: object, **options: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("teal_cli.steps.calibrate.load_model", load)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    flags = ["calibrate", "--model", str(tiny), "--dataset", str(corpus), "--offload"]
    assert run([*flags, "--device", "cuda"]) == 4
    assert "no GPU" in capsys.readouterr().err
    original = importlib.util.find_spec
    monkeypatch.setattr(
        "teal_cli.models.offload.find_spec", lambda name: None if name == "accelerate" else original(name)
    )
    assert run([*flags, "--device", "cpu"]) == 4
    assert "pip install 'teal-cli[offload]'" in capsys.readouterr().err
