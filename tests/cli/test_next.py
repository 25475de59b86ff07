"""The command that each verb names at its end is one that goes on from there."""

import re
import shlex
from pathlib import Path

import pytest
from conftest import export_tiny

from teal_cli.cli import run
from teal_cli.cli.output import next_command
from teal_cli.config import EvalConfig, GenerateConfig

_SMALLER = {
    "eval": ["--dataset", "{corpus}", "--tokens", "256", "--seq-len", "64"],
    "bench": ["--prompt-tokens", "8", "--new-tokens", "3", "--repeats", "1"],
    "generate": ["--max-new-tokens", "3"],
}


def _next(said: str) -> list[str]:
    (line,) = re.findall(r"next: teal (.*)", said)
    return shlex.split(line)


@pytest.mark.parametrize("extra", [[], ["--quantise", "int8", "--dtype", "float32", "--runs", "elsewhere"]])
def test_the_chain_of_next_commands(
    tiny: Path, corpus: Path, extra: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """From calibrate to generate, by nothing but what was said; nothing is calibrated twice."""
    flags = ["--dataset", str(corpus), "--tokens", "256", "--seq-len", "64"]
    command = ["calibrate", "--model", str(tiny), *flags, *extra]
    verbs = []
    while command[0] != "generate":
        assert run(command) == 0
        said = capsys.readouterr().err
        assert "calibrating first" not in said
        command = _next(said)
        verbs.append(command[0])
        command += [word.format(corpus=corpus) for word in _SMALLER.get(command[0], [])]
    assert verbs == ["export", "eval", "bench", "generate"]
    assert run(command) == 0
    assert [path.name for path in Path().iterdir() if path.is_dir()] == ["elsewhere" if extra else "runs"]


def test_a_calibration_and_a_model_elsewhere_are_named_again(tiny: Path, corpus: Path, capsys) -> None:
    flags = ["--dataset", str(corpus), "--tokens", "256", "--seq-len", "64", "--out", "my own"]
    assert run(["calibrate", "--model", str(tiny), *flags]) == 0
    command = _next(capsys.readouterr().err)
    assert command[command.index("--calibration") + 1] == "my own"
    assert run(command) == 0
    assert not (Path("runs/tiny") / "calibration.json").exists()


def test_of_several_allocations_the_first_goes_on() -> None:
    config = EvalConfig(model="m", allocation=["uniform", "greedy"], sparsity=[0.4, 0.5], quiet=True)
    assert next_command("bench", config, sparsity="0.4,0.5") == (
        "teal bench --model m --allocation uniform --sparsity 0.4,0.5"
    )
    switched = GenerateConfig(model="m", quantise="int4:64", quantise_output=True)
    assert next_command("eval", switched, quantise=None) == "teal eval --model m"
    also = EvalConfig(model="m", also_quantise=["int8"], quantise_output=True)
    assert next_command("bench", also) == "teal bench --model m"


def test_random_weights_have_no_next(capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path("configs/models")
    folder.mkdir(parents=True)
    shape = (
        "{model_type: llama, vocab_size: 300, hidden_size: 64, intermediate_size: 96, num_hidden_layers: 1, "
        "num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 256}"
    )
    (folder / "small.yaml").write_text(f"hub_id: nobody/small\nshape: {shape}\n")
    assert run(["bench", "--model", "small", "--random-weights", *_SMALLER["bench"]]) == 0
    assert "next:" not in capsys.readouterr().err


@pytest.mark.parametrize(("own", "said"), [(0.3, ""), (0.5, " --sparsity 0.5")])
def test_what_comes_after_a_bench_names_no_sparsity_that_nobody_asked_for(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], own: float, said: str
) -> None:
    """0.4 and 0.5 are asked for by default; a TEAL checkpoint has its own."""
    out, _ = export_tiny(tiny, tmp_path / "sparse", own)
    assert run(["bench", "--model", str(out), *_SMALLER["bench"]]) == 0
    assert f"next: teal generate --model {out}{said} --prompt" in capsys.readouterr().err
