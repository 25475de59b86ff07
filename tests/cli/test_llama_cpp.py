"""`teal bench --compare-llama-cpp`, beside a program that talks like llama-bench."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import fails
from conftest import save_tiny
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from teal_cli.bench.llama_cpp import LlamaBench, LlamaFile
from teal_cli.bench.timing import Spread
from teal_cli.cli import run
from teal_cli.errors import MachineError, UsageError
from teal_cli.models.loading import threads_restored
from teal_cli.report.tables import bench_tables

HIDDEN, INNER, VOCABULARY, BLOCKS = 64, 96, 500, 2
FAKE = """#!{python}
import json, sys
if "--help" in sys.argv:
    print({help!r})
    sys.exit(1)
with open({log!r}, "a") as log:
    print(json.dumps(sys.argv[1:]), file=log)
said = dict(zip(sys.argv[1::2], sys.argv[2::2]))
calls = len(open({log!r}).readlines())
entry = {{
    "build_commit": "abc123", "build_number": 77, "model_size": 4096, "type_k": "f16",
    "n_gen": int(said["-n"]), "n_depth": int(said["-d"]), "n_threads": int(said["-t"]),
    "avg_ts": 1000.0 * calls,
}}
{more}
print(json.dumps([entry]))
"""


def _program(folder: Path, more: str = "", *, says: str = "-d, --n-depth <n>") -> Path:
    """A llama-bench whose speeds are 1000, 2000, .. in the order of its calls, which it logs."""
    path = folder / "llama-bench"
    path.write_text(FAKE.format(python=sys.executable, help=says, log=str(folder / "calls"), more=more))
    path.chmod(0o755)
    return path


def _calls(folder: Path) -> list[dict[str, str]]:
    lines = [json.loads(line) for line in (folder / "calls").read_text().splitlines()]
    return [dict(zip(line[::2], line[1::2], strict=True)) for line in lines]


def _gguf(path: Path, kind: str = "F32", *, hidden: int = HIDDEN, output: str | None = None) -> Path:
    """A GGUF file of the small model's shape; of its blocks only what says their type."""
    writer = GGUFWriter(str(path), "llama")
    writer.add_embedding_length(hidden)
    writer.add_block_count(BLOCKS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    tensors = {"token_embd.weight": (VOCABULARY, "F32"), "blk.0.ffn_up.weight": (INNER, kind)}
    tensors |= {} if output is None else {"output.weight": (VOCABULARY, output)}
    for name, (rows, stored) in tensors.items():
        of_kind = GGMLQuantizationType[stored]
        writer.add_tensor(name, quantize(np.zeros((rows, hidden), dtype=np.float32), of_kind), raw_dtype=of_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def flags() -> list[str]:
    """A benchmark of a small model with random weights."""
    folder = Path("configs/models")
    folder.mkdir(parents=True)
    shape = (
        f"{{model_type: llama, vocab_size: {VOCABULARY}, hidden_size: {HIDDEN}, intermediate_size: {INNER}, "
        f"num_hidden_layers: {BLOCKS}, num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 256}}"
    )
    (folder / "small.yaml").write_text(f"hub_id: nobody/small\nshape: {shape}\n")
    return [
        *("bench", "--model", "small", "--random-weights", "--sparsity", "0.5", "--prompt-tokens", "8"),
        *("--new-tokens", "4", "--repeats", "3", "--device", "cpu"),
    ]


def test_ours_and_theirs_in_turn(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = _gguf(tmp_path / "m.gguf")
    beside = ["--compare-llama-cpp", str(_program(tmp_path)), "--llama-model", str(file)]
    with threads_restored():
        assert run([*flags, *beside, "--threads", "1", "--json", "b.json"]) == 0
        assert torch.get_num_threads() == 1
    first, *rounds = _calls(tmp_path)
    assert (first["-n"], first["-d"]) == ("1", "0")
    assert len(rounds) == 3
    for call in rounds:
        assert {call[flag] for flag in ("-p", "-ngl")} == {"0"}
        assert (call["-n"], call["-d"], call["-t"], call["-r"]) == ("4", "8", "1", "1")
        assert call["-m"] == str(file)
    result = json.loads(Path("b.json").read_text())
    theirs = result["llama_cpp"]
    assert theirs["tokens_per_second"] == {"median": 3000.0, "min": 2000.0, "max": 4000.0}
    expected = {"build": "abc123 (77)", "model": "m.gguf", "weights": "F32", "output_weights": "F32", "threads": 1}
    assert expected.items() <= theirs.items()
    for entry in result["runs"]:
        ratio, ours = entry["over_llama_cpp"], entry["tokens_per_second"]
        assert ratio["min"] <= ratio["median"] <= ratio["max"]
        assert ours["min"] / 4000 <= ratio["min"]
        assert ratio["max"] <= ours["max"] / 2000
    shown = capsys.readouterr().out
    assert "over llama.cpp" in shown
    assert "llama.cpp F32" in shown


def test_ratios_are_of_rounds() -> None:
    """A machine that gets twice as fast between two rounds changes no ratio."""
    assert Spread.of_ratios([10.0, 20.0, 40.0], [5.0, 10.0, 20.0]) == Spread(2.0, 2.0, 2.0)
    assert Spread.of_ratios([10.0, 30.0, 20.0], [10.0, 10.0, 10.0]) == Spread(2.0, 1.0, 3.0)
    with pytest.raises(ValueError, match="zip"):
        Spread.of_ratios([1.0, 2.0], [1.0])


def test_the_table_shows_the_ratio() -> None:
    run_entry = {
        **{"quantization": "", "backend": "cpu", "sparsity": 0.5, "realised_sparsity": 0.49, "neuron_sparsity": None},
        **{"tokens_per_second": {"median": 60.0, "min": 50.0, "max": 70.0}, "bytes_per_token": 2_000_000},
        **{"bandwidth_gb_s": 0.1, "speedup": 1.5, "over_llama_cpp": {"median": 2.0, "min": 1.75, "max": 2.25}},
    }
    theirs = {"weights": "Q8_0", "weight_bytes": 3e6, "tokens_per_second": {"median": 30.0, "min": 29.0, "max": 31.0}}
    result = {
        **{"model": "m", "dtype": "float32", "batch": 1, "device": "a CPU", "new_tokens": 4, "prompt_tokens": 8},
        **{"repeats": 3, "general_because": None, "reading_gb_s": None, "kernels": [], "quantization": "int8"},
        **{"runs": [run_entry], "llama_cpp": theirs},
    }
    (table,) = bench_tables(result)
    cells = [[str(cell) for cell in column.cells] for column in table.columns]
    assert cells[0] == ["cpu", "llama.cpp Q8_0"]
    assert cells[2] == ["60.0 (50.0-70.0)", "30.0 (29.0-31.0)"]
    assert cells[-1] == ["2.00x (1.75-2.25)", "1"]


@pytest.mark.parametrize(
    ("kind", "output", "width"),
    [
        ("F32", None, "float32"),
        ("BF16", None, "bfloat16"),
        ("F16", None, "float16"),
        ("Q8_0", None, "int8"),
        ("Q4_0", "Q8_0", "int4-32-output"),
        ("Q4_1", "F16", "int4-128"),
    ],
)
def test_widths(tmp_path: Path, kind: str, output: str | None, width: str) -> None:
    file = LlamaFile.read(_gguf(tmp_path / "m.gguf", kind, output=output))
    assert (file.weights, file.output_weights) == (kind, output or "F32")
    assert file.sizes["vocab_size"] == VOCABULARY
    file.require_width(width)
    for other in {"float32", "bfloat16", "float16", "int8-output", "int4-64"} - {width}:
        if other.partition("-")[0] != width.partition("-")[0]:
            with pytest.raises(UsageError, match=f"has {kind} weights and ours are {other}"):
                file.require_width(other)


def test_another_model_or_width_is_refused(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    beside = ["--compare-llama-cpp", str(_program(tmp_path)), "--llama-model"]
    wider = str(_gguf(tmp_path / "wider.gguf", hidden=128))
    fails(capsys, 2, "its hidden_size is 128, and that of small is 64", *flags, *beside, wider)
    narrow = str(_gguf(tmp_path / "narrow.gguf", "Q8_0"))
    fails(capsys, 2, "has Q8_0 weights and ours are float32", *flags, *beside, narrow)
    fails(capsys, 2, "has Q8_0 weights and ours are bfloat16", *flags, *beside, narrow, "--dtype", "bfloat16")
    fails(capsys, 2, "has Q8_0 weights and ours are int4-32", *flags, *beside, narrow, "--quantise", "int4:32")
    text = tmp_path / "text.gguf"
    text.write_text("no model")
    fails(capsys, 3, "is not a GGUF file", *flags, *beside, str(text))
    assert {call["-n"] for call in _calls(tmp_path)} == {"1"}, "nothing was timed"


def test_what_cannot_be_compared_is_refused(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = ["--llama-model", str(_gguf(tmp_path / "m.gguf"))]
    program = ["--compare-llama-cpp", str(_program(tmp_path))]
    fails(capsys, 2, "there is no such file", *flags, *file, "--compare-llama-cpp", str(tmp_path / "nowhere"))
    fails(capsys, 2, "go together", *flags, *program)
    fails(capsys, 2, "go together", *flags, *file)
    fails(capsys, 2, "leave out batch", *flags, *program, *file, "--batch", "2")
    fails(capsys, 2, "leave out also_quantise", *flags, *program, *file, "--also-quantise", "int8")
    fails(capsys, 2, "is for a CPU", *flags, *program, *file, "--device", "cuda")
    monkeypatch.setattr("teal_cli.steps.beside_llama_cpp.pick_device", lambda name: torch.device("cuda"))
    fails(capsys, 2, "is for a CPU", *flags, *program, *file, "--device", "auto")
    assert not (tmp_path / "calls").exists()


def test_programs_that_are_no_llama_bench(tmp_path: Path) -> None:
    file = LlamaFile.read(_gguf(tmp_path / "m.gguf"))

    def bench(program: Path) -> LlamaBench:
        return LlamaBench(program, file, threads=1, prompt_tokens=8, new_tokens=4)

    text = tmp_path / "text"
    text.write_text("no program")
    with pytest.raises(MachineError, match="cannot be run: "):
        bench(text)
    with pytest.raises(MachineError, match="has no option --n-depth"):
        bench(_program(tmp_path, says="-p, --n-prompt <n>"))
    with pytest.raises(MachineError, match="failed with exit code 1: 'failed to load model'"):
        bench(_program(tmp_path, "sys.exit('failed to load model')"))
    for more in (
        "print('hello')",
        "entry['avg_ts'] = 0",
        "entry['avg_ts'] = float('nan')",
        "entry['n_threads'] = 3",
        "del entry['n_depth']",
        "entry = [entry]",
    ):
        with pytest.raises(MachineError, match="printed no result that can be read"):
            bench(_program(tmp_path, more))


def test_a_program_that_fails_later_ends_the_run(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = _program(tmp_path, "if calls == 3: sys.exit('out of memory')")
    beside = ["--compare-llama-cpp", str(program), "--llama-model", str(_gguf(tmp_path / "m.gguf"))]
    fails(capsys, 4, "failed with exit code 1: 'out of memory'", *flags, *beside)
    assert len(_calls(tmp_path)) == 3


def test_a_path_without_a_folder_is_a_path(flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a name that is looked for among the programs of the system."""
    program = _program(tmp_path)
    monkeypatch.setenv("PATH", os.defpath)
    here = Path(os.path.relpath(program))
    beside = ["--compare-llama-cpp", str(here), "--llama-model", str(_gguf(tmp_path / "m.gguf"))]
    assert run([*flags, *beside, "--quiet"]) == 0


def test_each_stage_has_its_threads(tmp_path: Path, corpus: Path) -> None:
    dense = save_tiny(tmp_path / "tiny")
    Path("r.yaml").write_text(
        f"model: {dense}\ndevice: cpu\nstages: [calibrate, export, bench]\n"
        f"calibrate: {{dataset: {corpus}, tokens: 512, seq_len: 64, sensitivity_tokens: 64, threads: 1}}\n"
        "bench: {sparsity: 0.5, prompt_tokens: 8, new_tokens: 3, repeats: 1, threads: 3}\n"
    )
    before = torch.get_num_threads()
    assert run(["run", "r.yaml", "--json", "r.json"]) == 0
    assert torch.get_num_threads() == before
    result = json.loads(Path("r.json").read_text())
    assert result["bench"]["device"].endswith(", 3 threads")
    assert result["bench"]["config"]["threads"] == 3


@pytest.mark.parametrize("threads", ["0", "1025", "two"])
def test_numbers_of_threads(threads: str, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("bench", "generate", "eval"):
        fails(capsys, 2, "threads", verb, "--threads", threads)
