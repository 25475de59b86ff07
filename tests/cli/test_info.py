"""`teal info`: what runs here and why not what not, and how a model fits."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import FAMILIES, build_model

from teal_cli.cli import run
from teal_cli.quantise.rounding import quantise
from teal_cli.schemes import Scheme
from teal_cli.steps import info
from teal_kernels import support
from teal_kernels.native import library
from teal_kernels.native.library import unavailable_reason

_GIB = 2**30


def _asked(*flags: object) -> dict:
    assert run(["info", *map(str, flags), "--json", "i.json"]) == 0
    return json.loads(Path("i.json").read_text())


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch):
    """Sets how much memory is free, here and on the GPU."""

    def set_free(main: float, gpu: float = 0.0) -> None:
        monkeypatch.setattr(
            "teal_cli.steps.info.available_bytes",
            lambda device: int((gpu if device.type == "cuda" else main) * _GIB),
        )

    return set_free


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU as far as torch says."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "NVIDIA Something")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (8, 6))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *device: (20 * _GIB, 24 * _GIB))


def test_sizes_are_those_of_the_weights(tiny: Path) -> None:
    model = build_model("llama")
    (tiny / "model.safetensors").unlink()  # and no weights are read
    found = _asked("--model", tiny)["model"]
    assert (found["name"], found["model_type"], found["supported"]) == ("tiny", "llama", True)
    elements = sum(parameter.numel() for parameter in model.parameters())
    projections = [m.weight for n, m in model.named_modules() if n.endswith("_proj")]
    assert found["parameters"] == elements
    assert found["projection_parameters"] == sum(weight.numel() for weight in projections)
    sizes = {entry["weights"]: entry["bytes"] for entry in found["weights"]}
    rest = elements - found["projection_parameters"]
    packed = {
        text: sum(
            tensor.nbytes
            for weight in projections
            for tensor in vars(quantise(weight, Scheme.parse(text))).values()
            if isinstance(tensor, torch.Tensor)
        )
        for text in ("int8", "int4")
    }
    assert sizes == {
        "float32": 4 * elements,
        "bfloat16": 2 * elements,
        "int8": packed["int8"] + 4 * rest,
        "int4": packed["int4"] + 4 * rest,
    }
    # 2 layers, 2 heads of 16 for keys and for values, float32.
    assert found["cache_bytes_per_token"] == 2 * 2 * 2 * 16 * 4
    assert (found["path"] == "native") == (unavailable_reason() is None) == (found["general_because"] is None)
    assert (found["runs_as"], found["dtype"]) == ("float32", "float32")


@pytest.mark.parametrize(
    ("gib", "runs_as", "said"),
    [
        (40, "bfloat16", "bfloat16"),
        (10, "int8", "--quantise int8"),
        (6, "int4", "--quantise int4"),
        (3, None, "too large for this machine"),
    ],
)
def test_what_fits_is_advised(gib: float, runs_as: str | None, said: str, free, capsys) -> None:
    """An 8B that nobody has downloaded: 15.0 GiB in bfloat16, of which 13.0 are projections."""
    free(gib)
    result = _asked("--model", "llama-3-8b")
    assert result["model"]["runs_as"] == runs_as
    assert said in " ".join(capsys.readouterr().out.split())
    fits = {entry["weights"]: entry["fits_on_device"] for entry in result["model"]["weights"]}
    assert fits["bfloat16"] is (gib >= 15)
    assert fits["float32"] is (gib >= 30)


def test_a_gpu_and_its_path(gpu: None, free, tiny: Path, monkeypatch, capsys) -> None:
    free(64, gpu=20)
    monkeypatch.setattr(
        "teal_cli.steps.info.backend_unavailable_reason",
        lambda name, device, dtype: None if name != "cpu" else "the cpu backend needs CPU tensors, not cuda",
    )
    result = _asked("--model", tiny)
    assert result["gpu"]["compute_capability"] == "8.6"
    assert result["gpu"]["tuned"] is False
    assert result["no_gpu_because"] is None
    assert result["model"]["path"] == "compact"
    assert result["model"]["dtype"] == "bfloat16"
    assert result["model"]["weights"][0]["fits_in_main_memory"] is True
    out = " ".join(capsys.readouterr().out.split())
    assert "fused decode path (our own kernels from end to end)" in out
    assert "tile configs as measured on another GPU" in out
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    assert _asked("--model", tiny)["model"]["general_because"] == "activation gelu"


@pytest.mark.usefixtures("gpu")
def test_a_gpu_that_the_kernels_refuse(free, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """torch calls an AMD GPU cuda."""
    free(64, gpu=20)
    monkeypatch.setattr(torch.version, "hip", "7.2.0")
    support._wrong_gpu.cache_clear()
    result = _asked("--model", tiny)
    support._wrong_gpu.cache_clear()
    assert result["auto_backend"] == "reference"
    assert "need an NVIDIA GPU" in result["backends"]["triton"]
    assert (result["model"]["path"], result["model"]["general_because"]) == ("general", result["backends"]["triton"])
    out = " ".join(capsys.readouterr().out.split())
    assert "auto takes reference" in out
    assert "PTX" in out
    assert "tile configs" not in out


def test_why_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without CUDA" in str(info.no_gpu_reason())
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(info, "_driver", lambda: None)
    assert info.no_gpu_reason() == "no NVIDIA driver"
    monkeypatch.setattr(info, "_driver", lambda: "470.82")
    assert "the driver (470.82) and torch's CUDA 12.8 do not go together" in str(info.no_gpu_reason())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family(family: str) -> None:
    """From the shape alone; what cannot be quantised is not said to fit so."""
    folder = Path("configs/models")
    folder.mkdir(parents=True)
    (folder / "some.yaml").write_text(yaml.safe_dump({"hub_id": "some/model", "shape": FAMILIES[family]}))
    found = _asked("--model", "some")["model"]
    assert found["supported"]
    kinds = [entry["weights"] for entry in found["weights"]]
    assert kinds[:2] == ["float32", "bfloat16"]
    sizes = [entry["bytes"] for entry in found["weights"]]
    assert 0 < found["projection_parameters"] < found["parameters"] == sizes[0] / 4
    if len(kinds) > 2:
        assert kinds[2:] == ["int8", "int4"]
        assert sizes[3] < sizes[2] < sizes[0]


@pytest.mark.parametrize(
    ("shape", "cached"),
    [
        ({"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 300}, None),
        # An encoder, which the table does not say of an unknown type.
        ({"model_type": "distilbert", "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 100}, 2 * 2 * 64 * 4),
    ],
)
def test_types_without_a_row(tmp_path: Path, shape: dict[str, object], cached: int | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps(shape))
    found = _asked("--model", tmp_path, "--device", "cpu")["model"]
    assert not found["supported"]
    assert found["parameters"] > 0
    assert found["cache_bytes_per_token"] == cached


def test_models_that_cannot_run(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tiny / "config.json").write_text(json.dumps({"model_type": "codegen", "n_layer": 2, "n_embd": 64, "n_head": 4}))
    found = _asked("--model", tiny)["model"]
    assert (found["supported"], found["general_because"]) == (False, "model type codegen")
    assert [entry["weights"] for entry in found["weights"]] == ["float32", "bfloat16"]
    assert "not in the table" in capsys.readouterr().out
    (tiny / "config.json").write_text('{"model_type": "nothing-known"}')
    assert run(["info", "--model", str(tiny)]) == 3
    assert "cannot be understood" in capsys.readouterr().err
    assert run(["info", "--model", "nobody/nothing"]) == 3


def test_the_native_library(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = library.Native(("avx2", "baseline"), "avx2", Path("lib.so"), None)
    monkeypatch.setattr(library, "_opened", lambda path: (found, None))
    monkeypatch.setattr(library, "default_threads", lambda: 3)
    monkeypatch.delenv(library.SETTING, raising=False)
    expected = {"variant": "avx2", "variants": ["avx2", "baseline"], "threads": 3, "unavailable_because": None}
    assert _asked()["native"] == expected
    assert "avx2 (also baseline), 3 threads" in capsys.readouterr().out
    for setting, reason in (
        ("off", "switched off by TEAL_NATIVE=off"),
        ("neon", "TEAL_NATIVE=neon cannot run here, only avx2, baseline"),
    ):
        monkeypatch.setenv(library.SETTING, setting)
        found_now = _asked()["native"]
        assert found_now == {"variant": None, "variants": [], "threads": 3, "unavailable_because": reason}
        assert f"none: {reason}" in capsys.readouterr().out


def test_without_a_model_aliases_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    result = _asked()
    assert "model" not in result
    assert "Model aliases" in capsys.readouterr().out
