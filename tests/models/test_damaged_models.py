"""Model folders that are damaged, hostile or of another kind: one line, before anything is built, and no hang."""

import errno
import json
import os
import shutil
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, save_tiny
from safetensors.torch import load_file, save_file

from teal_cli.config import InfoConfig
from teal_cli.errors import ArtefactError, MachineError
from teal_cli.model_loading import load_model
from teal_cli.model_source import find_model, find_outline
from teal_cli.models.companions import companion_files
from teal_cli.models.config_checks import check_config
from teal_cli.models.loading import outline
from teal_cli.models.weights import tensor_header, weight_files
from teal_cli.steps.info import model_fit


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that is not to be changed."""
    return save_tiny(tmp_path_factory.mktemp("whole") / "tiny")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(whole, tmp_path / "tiny")


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    """None of these may take long, whatever a file says."""
    started = time.process_time()
    yield
    assert time.process_time() - started < 10


def _set(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


NAN, INFINITE = float("nan"), float("inf")
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    **{f"theta {v}": ({"rope_theta": v}, "rope_theta is") for v in (0, -1.0, -INFINITE, NAN, "x")},
    **{
        f"nested theta {v}": ({"rope_parameters": {"rope_theta": v}}, "rope_parameters.rope_theta is") for v in (0, NAN)
    },
    "factor": ({"rope_scaling": {"rope_type": "linear", "factor": INFINITE}}, "rope_scaling.factor is"),
    "factors": ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0, 0]}}, "short_factor is"),
    **{f"epsilon {v}": ({"rms_norm_eps": v}, "rms_norm_eps is") for v in (NAN, -1e-6, INFINITE, "x", True)},
    "epsilon within": ({"text_config": {"layer_norm_eps": NAN}}, "text_config.layer_norm_eps is"),
    **{f"layers {v}": ({"num_hidden_layers": v}, "num_hidden_layers is") for v in (0, -1, 10**9, 2.5, "x", True)},
    "heads": ({"num_attention_heads": 0}, "num_attention_heads is"),
    "vocabulary": ({"vocab_size": -5}, "vocab_size is"),
    "a list of layers": ({"num_hidden_layers": [2]}, "num_hidden_layers"),
    "an object for a number": ({"hidden_size": {"a": 1}}, "hidden_size"),
    "large": ({"hidden_size": 10**7, "head_dim": 16}, "describes a model of"),
    "large vocabulary": ({"vocab_size": 10**9}, "describes a model of"),
    "beyond all numbers": ({"vocab_size": 10**30}, "vocab_size is"),
    "fewer layers than stored": ({"num_hidden_layers": 1}, "model.layers.1.* no layer for"),
    "dtype": ({"dtype": "float17"}, "dtype is 'float17'"),
    "dtype of a list": ({"dtype": ["float32"]}, "dtype is"),
    **{f"type {v}": ({"model_type": v}, "names no model type") for v in (None, [], 3, "")},
    "unknown type": ({"model_type": "x" * 9999}, "cannot be understood"),
    "no mapping": ({"quantization_config": [1]}, "no mapping"),
    "no method": ({"quantization_config": {"bits": 4}}, "has no quant_method"),
    "fp8": ({"quantization_config": {"quant_method": "fp8"}}, "quantised by 'fp8'"),
    "bitsandbytes": ({"quantization_config": {"load_in_4bit": True}}, "quantised by 'bitsandbytes'"),
    "almost ours": ({"quantization_config": {"quant_method": "TEAL"}}, "quantised by 'TEAL'"),
    "compressed tensors": ({"compression_config": {"quant_method": "compressed-tensors"}}, "'compressed-tensors'"),
    "in part": ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "a part of the weights"),
    "dropout": ({"attention_dropout": 7}, "attention_dropout is"),
    "start token": ({"decoder_start_token_id": -1}, "decoder_start_token_id is"),
    "experts of a token": ({"num_experts_per_tok": 0}, "num_experts_per_tok is"),
    "deep": ({"a": json.loads('{"a":' * 50 + "1" + "}" * 50)}, "nested too deep"),
}


@pytest.mark.parametrize(("values", "reason"), CONFIGS.values(), ids=CONFIGS)
def test_a_configuration_that_no_model_has(folder: Path, values: dict[str, Any], reason: str) -> None:
    _set(folder, **values)
    with pytest.raises(ArtefactError, match=reason) as caught:
        load_model(find_model(str(folder)).folder, device="cpu", dtype="auto")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("family", FAMILIES)
def test_configurations_of_every_family_are_taken(family: str) -> None:
    check_config(FAMILIES[family], "it")
    check_config({**FAMILIES[family], "time_step_limit": [0.0, INFINITE], "num_key_value_heads": None}, "it")


def _header(**tensors: Any) -> bytes:
    return json.dumps(tensors).encode()


def _tensor(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS: dict[str, bytes] = {
    "no dtype": _header(a={"shape": [2], "data_offsets": [0, 8]}),
    "no shape": _header(a={"dtype": "F32", "data_offsets": [0, 8]}),
    "no offsets": _header(a={"dtype": "F32", "shape": [2]}),
    "unknown dtype": _header(a=_tensor("F31")),
    "dtype of a list": _header(a=_tensor(["F32"])),
    "another shape": _header(a=_tensor(shape=[3])),
    "negative shape": _header(a=_tensor(shape=[-1, -2])),
    "shape of text": _header(a=_tensor(shape="2")),
    "swapped offsets": _header(a=_tensor(offsets=[8, 0])),
    "overlapping": _header(a=_tensor(), b=_tensor(shape=[1], offsets=[4, 8])),
    "a gap": _header(a=_tensor(shape=[1], offsets=[4, 8])),
    "one offset": _header(a=_tensor(offsets=[8])),
    "fields in a list": _header(a=["F32", [2], [0, 8]]),
    "a list": b"[1]",
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_header_that_contradicts_itself(tmp_path: Path, header: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(ArtefactError, match="damaged"):
        tensor_header(file)


def test_a_whole_header_is_taken(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2), "empty": torch.ones(0, 3), "b": torch.ones((), dtype=torch.bool)}, file)
    assert set(tensor_header(file)) == {"a", "empty", "b"}


@pytest.mark.parametrize("name", ["../tiny/model.safetensors", "/etc/passwd", 3, None, "a\0b", ["x"]])
def test_an_index_that_names_no_file_of_the_folder(folder: Path, name: Any) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ArtefactError, match=r"index\.json names"):
        weight_files(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_ordinary_file_is_not_read(folder: Path, name: str, kind: str) -> None:
    (folder / name).unlink(missing_ok=True)
    if name.endswith("index.json"):
        (folder / "model.safetensors").unlink()
    if kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to("/dev/zero")
    with pytest.raises(ArtefactError, match="not an ordinary file"):
        find_model(str(folder))


def test_only_what_belongs_to_the_model_is_copied(folder: Path, tmp_path: Path) -> None:
    """The hub's cache holds links into its own blobs; others may lead to anybody's files."""
    names = {file.name for file in companion_files(folder, with_index=False)}
    assert names >= {"tokenizer.json", "generation_config.json"}
    cache = tmp_path / "models--a--b"
    snapshot, blobs = cache / "snapshots" / "1", cache / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "0").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/0")
    (snapshot / "folder.json").mkdir()
    assert [file.name for file in companion_files(snapshot, with_index=False)] == ["tokenizer.json"]
    secret = tmp_path / "secret"
    secret.write_text("mine")
    (snapshot / "notes.txt").symlink_to(secret)
    with pytest.raises(ArtefactError, match=r"notes\.txt is a link that leads out"):
        companion_files(snapshot, with_index=False)
    (snapshot / "notes.txt").unlink()
    os.mkfifo(snapshot / "notes.txt")
    with pytest.raises(ArtefactError, match="not an ordinary file"):
        companion_files(snapshot, with_index=False)


def test_a_folder_of_adapters(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    for find in (find_model, find_outline):
        with pytest.raises(ArtefactError, match="merge it into its base model"):
            find(str(folder))


def test_codes_of_older_programs(folder: Path) -> None:
    (folder / "quantize_config.json").write_text('{"bits": 4}')
    find_model(str(folder))  # the weights are dense
    (folder / "model.safetensors").unlink()
    save_file({"a.qweight": torch.ones(1, dtype=torch.int32)}, folder / "gptq_model-4bit-128g.safetensors")
    with pytest.raises(ArtefactError, match=r"put the content of quantize_config\.json into config\.json"):
        find_model(str(folder))


@pytest.mark.parametrize(
    "spec", ["a\0b", "x" * 5000, "~nobody-of-that-name/model", "a/" + "b" * 200, "a/b..c", "a/b--c"]
)
def test_a_name_that_no_model_has(spec: str) -> None:
    for find in (find_model, find_outline):
        with pytest.raises(ArtefactError) as caught:
            find(spec)
        assert len(str(caught.value)) < 700  # it lists the models that have short names


def test_a_hub_cache_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*args: object, **options: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", "/somewhere/hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(MachineError, match=r"/somewhere/hub.*set the variable HF_HOME"):
        find_model("org/name")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_auto_is_the_dtype_of_the_stored_weights(folder: Path, dtype: torch.dtype) -> None:
    """Where the configuration names none; norms in float32 are no majority."""
    tensors = load_file(folder / "model.safetensors")
    stored = {key: tensor if "norm" in key else tensor.to(dtype) for key, tensor in tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    for named, wanted in ((None, dtype), ("float32", torch.float32)):
        _set(folder, dtype=named)
        assert load_model(folder, device="cpu", dtype="auto").dtype == wanted
        fit = model_fit(InfoConfig(model=str(folder), device="cpu"))
        assert fit["dtype"] == str(wanted).removeprefix("torch.")


def test_auto_is_the_dtype_that_the_text_model_names(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", "gemma3")
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = None
    config["text_config"]["dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(config))
    assert load_model(folder, device="cpu", dtype="auto").dtype == torch.bfloat16


def test_an_outline_needs_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert len(outline(folder).model.layers) == 2
