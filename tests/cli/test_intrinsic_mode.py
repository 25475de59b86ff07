"""`--mode intrinsic` through the command line, on tiny models that are sparse by their activation."""

import json
from pathlib import Path

import pytest
from conftest import export_tiny, save_tiny
from intrinsic_models import save_kind

from teal_cli.cli import run

MODE = ("--mode", "intrinsic")


def _teal(*arguments: object) -> int:
    return run([str(argument) for argument in arguments])


def _json(path: str) -> dict:
    return json.loads(Path(path).read_text())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_kind(tmp_path / "prosparse", "sparsellama", tokenizer=True)


@pytest.mark.parametrize("kind", ["relu", "relu2", "sparsellama", "bamboo"])
def test_generate_writes_what_the_dense_model_writes(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_kind(tmp_path / kind, kind, tokenizer=True)
    flags = ("--model", folder, "--prompt", "the stars", "--max-new-tokens", 24, "--json", "g.json")
    assert _teal("generate", *flags, *MODE) == 0
    captured = capsys.readouterr()
    result = _json("g.json")
    assert "of the MLP neurons zero" in captured.err
    assert "calibrat" not in captured.err
    assert not Path("runs").exists()
    assert (result["mode"], result["target_sparsity"]) == ("intrinsic", 0.0)
    assert 0.3 < result["neuron_sparsity"] < 0.9
    assert 0.1 < result["realised_sparsity"] < result["neuron_sparsity"]
    assert _teal("generate", *flags, *MODE, "--sparsity", 0) == 0  # dense
    dense = _json("g.json")
    assert dense["realised_sparsity"] is None
    assert dense["text"] == result["text"]


def test_eval_finds_no_loss(folder: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--text", corpus, "--tokens", 256, "--seq-len", 64, "--json", "v.json")
    written = ("--generate", "--prompts", 2, "--prompt-tokens", 8, "--new-tokens", 8)
    assert _teal("eval", "--model", folder, *MODE, *flags, *written) == 0
    assert "MLP neurons that are zero" in capsys.readouterr().out
    result = _json("v.json")
    sparse = result["sparse"]
    assert result["mode"] == "intrinsic"
    assert result["half"] == "evaluation"
    assert result["perplexity_ratio"] == pytest.approx(1.0, abs=1e-6)
    assert (sparse["allocation"], sparse["top1_agreement"]) == ("intrinsic", 1.0)
    assert sparse["kl"] == pytest.approx(0.0, abs=1e-6)
    assert result["generation"]["identical"] == 1.0
    assert 0.3 < sparse["neuron_sparsity"] < 0.9
    assert sparse["bytes_per_token"] < result["dense_bytes_per_token"]
    by_projection = result["runs"][0]["realised_by_projection"]
    assert by_projection["model.layers.0.mlp.gate_proj"] == 0.0
    assert by_projection["model.layers.0.mlp.up_proj"] > 0.3


def test_bench(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--prompt-tokens", 8, "--new-tokens", 8, "--repeats", 2, "--json", "b.json")
    assert _teal("bench", "--model", folder, *MODE, *flags) == 0
    assert "own (0." in capsys.readouterr().out
    result = _json("b.json")
    dense, sparse = result["runs"]
    assert result["mode"] == "intrinsic"
    assert (dense["backend"], dense["neuron_sparsity"]) == ("dense", None)
    assert (sparse["backend"], sparse["sparsity"]) == ("cpu", 0.0)
    assert 0.1 < sparse["realised_sparsity"] < sparse["neuron_sparsity"]
    assert sparse["bytes_per_token"] < dense["bytes_per_token"]


def test_bench_with_random_weights(capsys: pytest.CaptureFixture[str]) -> None:
    Path("configs/models").mkdir(parents=True)
    shape = {
        "model_type": "sparsellama",
        "hidden_act": "fatrelu",
        "hidden_act_param": 0.001,
        "hidden_size": 64,
        "intermediate_size": 100,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 300,
    }
    Path("configs/models/mine.yaml").write_text(json.dumps({"hub_id": "a/b", "shape": shape}))
    flags = ("--prompt-tokens", 8, "--new-tokens", 8, "--repeats", 1, "--json", "b.json")
    assert _teal("bench", "--model", "mine", "--random-weights", *MODE, *flags) == 0
    assert 0.4 < _json("b.json")["runs"][1]["neuron_sparsity"] < 0.7
    Path("configs/models/mine.yaml").write_text(
        json.dumps({"hub_id": "a/b", "shape": shape | {"hidden_act": "fatrelo"}})
    )
    capsys.readouterr()
    assert _teal("bench", "--model", "mine", "--random-weights", *MODE, *flags) == 3
    assert "alias mine: unknown activation 'fatrelo'" in capsys.readouterr().err


def test_a_recipe(folder: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("r.yaml").write_text(
        f"stages: [eval, bench]\nmodel: {folder}\nmode: intrinsic\ntext: {corpus}\ntokens: 256\nseq_len: 64\n"
        "prompt_tokens: 8\nnew_tokens: 8\nrepeats: 1\n"
    )
    assert _teal("run", "r.yaml") == 0
    table = capsys.readouterr().out.split("Dense against sparse")[1]
    assert "own" in table
    assert "1.000" in table


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--sparsity", "0.5"), "leave out sparsity (flag --sparsity)"),
        (("--calibration", "runs/x"), "leave out calibration (flag --calibration)"),
        (("--allocation", "uniform"), "leave out allocation (flag --allocation)"),
        (("--quantise", "int8"), "leave out quantise (flag --quantise)"),
    ],
)
@pytest.mark.parametrize("verb", ["generate", "bench", "eval"])
def test_what_is_of_calibration_is_refused(
    verb: str, flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _teal(verb, *MODE, *flags) == 2
    assert message in capsys.readouterr().err


def test_models_that_it_is_not_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    silu = save_tiny(tmp_path / "silu")
    assert _teal("generate", "--model", silu, *MODE, "--prompt", "a", "--max-new-tokens", 4) == 3
    error = capsys.readouterr().err
    assert "(silu) makes no zeros to skip" in error
    assert error.count("\n") == 1
    exported, _ = export_tiny(silu, tmp_path / "exported")
    (exported / "tokenizer.json").write_bytes((silu / "tokenizer.json").read_bytes())
    assert _teal("generate", "--model", exported, *MODE, "--prompt", "a", "--max-new-tokens", 4) == 2
    assert "is a TEAL checkpoint: teal generate --mode intrinsic needs the dense model" in capsys.readouterr().err
