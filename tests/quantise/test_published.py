"""Checkpoints that GPTQ and AWQ quantised: their codes come through to a TEAL checkpoint, none changed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_CONFIGS, save_tiny
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from teal_cli.cli import run
from teal_cli.errors import ArtefactError
from teal_cli.models.source import find_model
from teal_cli.quantise.scheme import Scheme
from teal_cli.quantise.values import quantise
from teal_cli.resources import teal_home
from teal_kernels.packing import codes_of, pack

GROUP = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _words(codes: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """(rows, 8 n) codes -> (rows, n) int32, the code at place order[i] in bits 4 i."""
    eights = codes.to(torch.int64).unflatten(-1, (-1, 8))[..., list(order)]
    words = (eights << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _publish(folder: Path, method: str, form: str = "gptq", *, shuffled: bool = False) -> dict[str, Any]:
    """Quantise a tiny model's projections as GPTQ or AWQ keep them; what was stored, by layer."""
    weights = load_file(folder / "model.safetensors")
    stored: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for key, weight in weights.items():
        if not key.endswith("_proj.weight"):
            tensors[key] = weight
            continue
        name = key.removesuffix(".weight")
        packed = quantise(weight, Scheme(4, GROUP))
        assert packed.zeros is not None
        codes, zeros = codes_of(packed), packed.zeros.round().clamp(1, 15)
        stored[name] = pack(codes, packed.scales, zeros.half(), bits=4, group=GROUP)
        if method == "gptq":
            tensors[f"{name}.qweight"] = _words(codes.t()).t().contiguous()
            tensors[f"{name}.qzeros"] = _words(zeros - (1 if form == "gptq" else 0))
            groups = torch.arange(weight.shape[1]) // GROUP
            tensors[f"{name}.g_idx"] = (groups.flip(0) if shuffled else groups).to(torch.int32)
        else:
            tensors[f"{name}.qweight"] = _words(codes, AWQ_ORDER)
            tensors[f"{name}.qzeros"] = _words(zeros, AWQ_ORDER)
        tensors[f"{name}.scales"] = packed.scales
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": GROUP}
    config["quantization_config"] |= {"checkpoint_format": form} if method == "gptq" else {"version": "gemm"}
    (folder / "config.json").write_text(json.dumps(config))
    return stored


def _save(folder: Path) -> Path:
    """A tiny model of widths that eight codes a word and groups of 32 divide, as published ones have them."""
    save_tiny(folder)
    shape = {**TINY_CONFIGS["llama"], "intermediate_size": 96}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape)).save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("own_tables")
@pytest.mark.parametrize(("method", "form"), [("gptq", "gptq"), ("gptq", "gptq_v2"), ("awq", "gemm")])
def test_no_code_is_lost_on_the_way_to_a_checkpoint(tmp_path: Path, method: str, form: str) -> None:
    folder = _save(tmp_path / "model")
    stored = _publish(folder, method, form)
    corpus = tmp_path / "text.txt"
    corpus.write_text("the keeper of the lighthouse writes down the weather every evening at nine\n" * 200)
    arguments = f"--model {folder} --quantize int4:{GROUP} --device cpu --runs {tmp_path / 'r'}".split()
    text = ["--dataset", str(corpus), "--tokens", "256", "--seq-len", "64", "--sensitivity-tokens", "64"]
    assert run(["calibrate", *arguments, *text]) == 0
    assert run(["export", *arguments, "--sparsity", "0.4", "--allocation", "uniform"]) == 0
    exported = load_file(tmp_path / "r" / "model-int4-32" / "uniform-0.40" / "model.safetensors")
    assert stored
    for name, packed in stored.items():
        assert torch.equal(exported[f"{name}.qweight"], packed.words)
        assert torch.equal(exported[f"{name}.scales"], packed.scales)
        assert torch.equal(exported[f"{name}.zeros"], packed.zeros)


@pytest.mark.usefixtures("own_tables")
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_memory_is_asked_for_first(
    tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is stored and all weights at one time; a byte less is refused, and nothing left behind."""
    folder = _save(tmp_path / "model")
    dense = load_file(folder / "model.safetensors")
    _publish(folder, method)
    kept = [*load_file(folder / "model.safetensors").values(), *(dense[k] for k in dense if k.endswith("_proj.weight"))]
    needed = sum(tensor.nbytes for tensor in kept)
    models = teal_home() / "models"
    with monkeypatch.context() as patch:
        patch.setattr("teal_cli.models.loading.available_bytes", lambda device: needed - 1)
        assert run(["calibrate", "--model", str(folder), "--quantize", f"int4:{GROUP}", "--device", "cpu"]) == 4
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("teal: ")]
    assert f"out of memory: laying out the codes of {folder} anew needs" in line
    assert "larger machine" in line
    assert not [path for path in models.iterdir() if path.is_dir()]
    monkeypatch.setattr("teal_cli.models.loading.available_bytes", lambda device: needed)
    assert find_model(str(folder)).folder.parent == models


@pytest.mark.usefixtures("own_tables")
def test_what_cannot_be_taken_over_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _save(tmp_path / "shuffled")
    _publish(folder, "gptq", shuffled=True)
    with pytest.raises(ArtefactError, match="not neighbours"):
        find_model(str(folder))
    folder = _save(tmp_path / "other")
    _publish(folder, "awq")
    assert run(["calibrate", "--model", str(folder), "--quantize", "int4:64", "--device", "cpu"]) == 2
    assert "codes of int4:32" in capsys.readouterr().err
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["bits"] = 3
    path.write_text(json.dumps(config))
    with pytest.raises(ArtefactError, match="3 bits"):
        find_model(str(folder))
