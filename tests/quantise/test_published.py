"""Checkpoints that GPTQ and AWQ quantised: their codes come through to a TEAL checkpoint, none changed."""

import json
import shutil
from collections.abc import Callable
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
from teal_cli.model_loading import load_model
from teal_cli.model_source import ModelSource, find_model
from teal_cli.quantise.rounding import quantise
from teal_cli.resources import teal_home
from teal_cli.schemes import Scheme
from teal_kernels.packing import codes_of, pack

GROUP = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _words(codes: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """(rows, 8 n) codes -> (rows, n) int32, the code at place order[i] in bits 4 i."""
    eights = codes.to(torch.int64).unflatten(-1, (-1, 8))[..., list(order)]
    words = (eights << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _publish(
    folder: Path,
    method: str,
    form: str = "gptq",
    *,
    shuffled: bool = False,
    lowest: int = 1,
    less_one: Callable[[Tensor], Tensor] = lambda zeros: _words((zeros.to(torch.int64) - 1) & 15),
    config: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Quantise a tiny model's projections as GPTQ or AWQ keep them; what was stored, by layer.

    Args:
        folder: a dense model's; it becomes the quantised one.
        method: gptq or awq.
        form: gptq keeps zero points less one.
        shuffled: the groups are not of neighbouring inputs.
        lowest: zero point.
        less_one: how zero points are packed by form gptq.
        config: what quantization_config says; None says what belongs to the form.
    """
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
        codes, zeros = codes_of(packed), packed.zeros.round().clamp(lowest, 15)
        zeros[:, 3] = lowest  # a zero point of 0 in the middle of a word
        stored[name] = pack(codes, packed.scales, zeros.half(), bits=4, group=GROUP)
        if method == "gptq":
            tensors[f"{name}.qweight"] = _words(codes.t()).t().contiguous()
            tensors[f"{name}.qzeros"] = less_one(zeros) if form == "gptq" else _words(zeros)
            groups = torch.arange(weight.shape[1]) // GROUP
            tensors[f"{name}.g_idx"] = (groups.flip(0) if shuffled else groups).to(torch.int32)
        else:
            tensors[f"{name}.qweight"] = _words(codes, AWQ_ORDER)
            tensors[f"{name}.qzeros"] = _words(zeros, AWQ_ORDER)
        tensors[f"{name}.scales"] = packed.scales
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if config is None:
        config = {"checkpoint_format": form} if method == "gptq" else {"version": "gemm"}
    _configure(folder, quant_method=method, bits=4, group_size=GROUP, **config)
    return stored


def _configure(folder: Path, **quantisation: Any) -> None:
    """Set keys of quantization_config."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = config.get("quantization_config", {}) | quantisation
    path.write_text(json.dumps(config))


def _zeros_of(source: ModelSource) -> dict[str, Tensor]:
    """Zero points that a conversion found."""
    return {
        key.removesuffix(".zeros"): tensor
        for key, tensor in load_file(source.folder / "codes-int4-32.safetensors").items()
        if key.endswith(".zeros")
    }


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
    arguments = f"--model {folder} --quantise int4:{GROUP} --device cpu --runs {tmp_path / 'r'}".split()
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
        assert run(["calibrate", "--model", str(folder), "--quantise", f"int4:{GROUP}", "--device", "cpu"]) == 4
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
    assert run(["calibrate", "--model", str(folder), "--quantise", "int4:64", "--device", "cpu"]) == 2
    assert "codes of int4:32" in capsys.readouterr().err


def _borrowing(zeros: Tensor) -> Tensor:
    """As gptqmodel packs: one less in every place of the whole word, borrows and all."""
    words = _words(zeros).to(torch.int64) - 0x11111111
    return torch.where(words < -(1 << 31), words + (1 << 32), words).to(torch.int32)


FORMATS = {
    "by format": ("gptq_v2", {"format": "gptq_v2"}),
    "in capitals": ("gptq_v2", {"format": "GPTQ_V2", "quant_method": "GPTQ"}),
    "the older key counts": ("gptq_v2", {"format": "gptq", "checkpoint_format": "gptq_v2"}),
    "the older key in capitals": ("gptq", {"format": "gptq_v2", "checkpoint_format": "GPTQ"}),
    "none": ("gptq", {}),
}


@pytest.mark.usefixtures("own_tables")
@pytest.mark.parametrize(("form", "config"), FORMATS.values(), ids=FORMATS)
def test_zero_points_are_those_of_the_format_that_transformers_reads(
    tmp_path: Path, form: str, config: dict[str, Any]
) -> None:
    """The lowest ones too, which the first format keeps as 15."""
    folder = _save(tmp_path / "model")
    stored = _publish(folder, "gptq", form, lowest=0)
    _configure(folder, checkpoint_format=None)
    _configure(folder, **config)
    found = _zeros_of(find_model(str(folder)))
    assert all(torch.equal(found[name], packed.zeros) for name, packed in stored.items())
    assert min(float(zeros.min()) for zeros in found.values()) == 0


@pytest.mark.usefixtures("own_tables")
def test_zero_points_that_gptqmodel_took_from_whole_words(tmp_path: Path) -> None:
    folder = _save(tmp_path / "model")
    config = {"format": "gptq", "sym": False, "meta": {"quantizer": ["gptqmodel:5.0.0"]}}
    stored = _publish(folder, "gptq", lowest=0, less_one=_borrowing, config=config)
    found = _zeros_of(find_model(str(folder)))
    assert all(torch.equal(found[name], packed.zeros) for name, packed in stored.items())


@pytest.mark.usefixtures("own_tables")
@pytest.mark.parametrize(("sym", "zero"), [(True, 8), (False, 9)])
def test_symmetric_codes_under_the_name_of_the_first_format(tmp_path: Path, sym: bool, zero: int) -> None:
    """Symmetric zero points are 8: what keeps them so is the second format, whatever it is called."""
    folder = _save(tmp_path / "model")
    config = {"format": "gptq", "sym": sym}
    _publish(folder, "gptq", less_one=lambda zeros: _words(torch.full_like(zeros, 8)), config=config)
    assert all((zeros == zero).all() for zeros in _zeros_of(find_model(str(folder))).values())


@pytest.mark.usefixtures("own_tables")
def test_a_conversion_is_not_taken_for_another_configuration(tmp_path: Path) -> None:
    folder = _save(tmp_path / "model")
    _publish(folder, "gptq")
    first = find_model(str(folder))
    assert find_model(str(folder)).folder == first.folder
    _configure(folder, checkpoint_format="gptq_v2")
    second = find_model(str(folder))
    assert all((zeros == _zeros_of(first)[name] - 1).all() for name, zeros in _zeros_of(second).items())


@pytest.mark.usefixtures("own_tables")
def test_weights_take_the_dtype_of_the_scales_where_none_is_named(tmp_path: Path) -> None:
    folder = _save(tmp_path / "model")
    tensors = {key: tensor.half() for key, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _publish(folder, "awq")
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    found = load_file(find_model(str(folder)).folder / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.float16}
    assert load_model(find_model(str(folder)).folder, device="cpu", dtype="auto").dtype == torch.float16


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "3 bits": ("gptq", {"bits": 3}, "3 bits"),
    "bits as text": ("gptq", {"bits": "4"}, "'4' bits"),
    "one group": ("gptq", {"group_size": -1}, "group_size -1"),
    "no group": ("gptq", {"group_size": None}, "group_size is None"),
    "marlin": ("gptq", {"checkpoint_format": "marlin"}, "format 'marlin'"),
    "marlin by flag": ("gptq", {"is_marlin_format": True}, "format 'marlin'"),
    "a format of AWQ": ("gptq", {"checkpoint_format": "gemm"}, "format 'gemm'"),
    "no text": ("gptq", {"checkpoint_format": 2}, "format 2"),
    "gemv": ("awq", {"version": "GEMV"}, "format 'GEMV'"),
    "gemv by format": ("awq", {"version": None, "format": "gemv"}, "format 'gemv'"),
    "exllama": ("awq", {"version": "exllama"}, "format 'exllama'"),
    "llm-awq": ("awq", {"backend": "llm-awq"}, "format 'llm-awq'"),
    "no zero points": ("awq", {"zero_point": False}, "zero_point false"),
    "packed in bytes": ("gptq", {"pack_dtype": "int8"}, "pack_dtype 'int8'"),
    "some of 8 bits": ("gptq", {"dynamic": {"+:.*down.*": {"bits": 8}}}, "dynamic"),
    "rotated": ("gptq", {"rotation": "hadamard"}, "rotation"),
    "other groups": ("gptq", {"group_size": 64}, "do not fit codes"),
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each method."""
    home = tmp_path_factory.mktemp("published")
    folders = {method: _save(home / method) for method in ("gptq", "awq")}
    for method, folder in folders.items():
        _publish(folder, method)
    return folders


@pytest.mark.usefixtures("own_tables")
@pytest.mark.parametrize(("method", "config", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_read_is_refused_before_work(
    tmp_path: Path, published: dict[str, Path], method: str, config: dict[str, Any], reason: str
) -> None:
    folder = shutil.copytree(published[method], tmp_path / "model")
    _configure(folder, **config)
    said: list[str] = []
    with pytest.raises(ArtefactError, match=reason):
        find_model(str(folder), said.append)
    assert not said


@pytest.mark.usefixtures("own_tables")
def test_damaged_codes_are_refused_before_work(tmp_path: Path, published: dict[str, Path]) -> None:
    whole = load_file(published["gptq"] / "model.safetensors")
    name = next(key for key in whole if key.endswith(".qzeros"))
    scales = name.replace("qzeros", "scales")
    for change, reason in {
        name: "has no qzeros",
        f"{name} ": "do not fit",
        f"{scales} ": "do not fit",
        f"{scales}!": "cannot hold",
    }.items():
        folder = shutil.copytree(published["gptq"], tmp_path / "model", dirs_exist_ok=True)
        tensors = dict(whole)
        key = change.rstrip(" !")
        if change == key:
            del tensors[key]
        elif change.endswith("!"):
            tensors[key] = tensors[key].float() * 1e9
        else:
            tensors[key] = tensors[key][:, 1:].contiguous()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ArtefactError, match=reason):
            find_model(str(folder))
