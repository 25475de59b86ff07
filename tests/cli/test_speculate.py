"""`--speculate` of generate and bench on a tiny model, through the command line and from Python."""

import json
from pathlib import Path

import pytest
from command_line import calibrate_on, copied
from conftest import save_tiny, write_corpus

import teal_cli
from teal_cli.bench.speculation import real_prompts
from teal_cli.cli import run

CONTEXT = 1024
"""Room for real prompts, which the tiny tokenizer cuts into many tokens."""
PROMPT = ("--prompt", "the stars and the stars", "--max-new-tokens", 24, "--json", "g.json")


def _teal(*arguments: object) -> int:
    return run([str(argument) for argument in arguments])


def _json(path: str | Path) -> dict:
    return json.loads(Path(path).read_text())


@pytest.fixture(scope="module")
def calibrated_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("calibrated")
    config = save_tiny(home / "tiny", chat=True) / "config.json"
    config.write_text(json.dumps(_json(config) | {"max_position_embeddings": CONTEXT}))
    calibrate_on(write_corpus(home / "corpus.txt"), home / "tiny", home / "runs")
    return home


@pytest.fixture
def calibrated(calibrated_home: Path, tmp_path: Path) -> Path:
    return copied(calibrated_home, tmp_path)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("int8", ()),
        ("lookup+int4:32", ("--draft-tokens", 2)),
        ("sparse", ("--sparsity", 0.5)),
        ("int8+sparse", ("--sparsity", 0.5, "--draft-tokens", 3)),
    ],
)
def test_generate_writes_what_the_dense_model_writes(
    calibrated: Path, kind: str, more: tuple[object, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert _teal("generate", "--model", calibrated, *PROMPT, "--sparsity", 0) == 0
    dense = _json("g.json")
    assert dense["speculation"] is None
    capsys.readouterr()
    assert _teal("generate", "--model", calibrated, *PROMPT, "--speculate", kind, *more) == 0
    found = _json("g.json")
    assert found["text"] == dense["text"]
    assert found["decodes"] == "dense"
    assert found["target_sparsity"] == (0.5 if "sparse" in kind else 0.0)
    speculation = found["speculation"]
    assert speculation["drafts"] == kind
    assert speculation["passes"] + round((speculation["acceptance"] or 0) * speculation["drafted"]) >= 1
    said = capsys.readouterr().err
    assert f"tokens a pass from drafts ({kind})" in said
    assert ("quantising a copy" in said) == ("int" in kind)


def test_an_export_and_a_quantised_model_verify(calibrated: Path) -> None:
    assert _teal("export", "--model", calibrated, "--sparsity", 0.4, "--out", "half") == 0
    assert _teal("generate", "--model", "half", *PROMPT, "--speculate", "sparse", "--draft-tokens", 2) == 0
    found = _json("g.json")
    assert found["realised_sparsity"] == pytest.approx(0.4, abs=0.2)
    assert _teal("generate", "--model", calibrated, *PROMPT, "--sparsity", 0) == 0
    assert _json("g.json")["text"] == found["text"]


def test_bench_measures_drafts(calibrated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--prompt-tokens", 8, "--new-tokens", 6, "--repeats", 1, "--json", "b.json")
    kinds = "sparse,lookup+int8"
    assert _teal("bench", "--model", calibrated, "--sparsity", "0.3,0.6", "--speculate", kinds, *flags) == 0
    result = _json("b.json")
    found = [(own["drafts"], own["sparsity"]) for own in result["speculation"]]
    assert found == [("sparse", 0.3), ("sparse", 0.6), ("lookup+int8", 0.0)]
    for own in result["speculation"]:
        assert set(own["prompts"]) == set(real_prompts())
        assert len(own["prompts"]) == 10
        assert own["differing"] == 0
        assert own["tokens"] >= 5 * len(own["prompts"])
        assert list(own["pass_seconds"]) == ["1", "2", "4", "8"]
        assert own["draft_step_seconds"]["median"] > 0
        assert own["speedup"]["min"] <= own["speedup"]["median"] <= own["speedup"]["max"]
        assert sum(own["passes"].values()) == pytest.approx(own["tokens"] / own["tokens_per_pass"])
    assert [own["draft_bytes"] > 0 for own in result["speculation"]] == [False, False, True]
    assert "Decoding from drafts" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags", [("--prompt-tokens", 8, "--new-tokens", CONTEXT - 12), ("--prompt-tokens", CONTEXT - 6, "--new-tokens", 2)]
)
def test_bench_beyond_the_context_is_refused(
    calibrated: Path, flags: tuple[object, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """By real prompts, which are longer than those of `--prompt-tokens`, and by passes over eight tokens."""
    assert _teal("bench", "--model", calibrated, "--speculate", "lookup", "--repeats", 1, *flags) == 3
    said = capsys.readouterr().err
    assert f"exceed the model's context of {CONTEXT}" in said
    assert "decoding" not in said


def test_bench_of_random_weights_says_nothing_of_acceptance(capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path("configs/models")
    folder.mkdir(parents=True)
    (folder / "small.yaml").write_text(
        "hub_id: nobody/small\nshape: {model_type: llama, vocab_size: 512, hidden_size: 64, intermediate_size: 96,"
        " num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 256}\n"
    )
    flags = ("--prompt-tokens", 8, "--new-tokens", 4, "--repeats", 1, "--json", "b.json")
    drafts = ("--speculate", "int4:32+sparse", "--sparsity", 0.5)
    assert _teal("bench", "--model", "small", "--random-weights", *drafts, *flags) == 0
    (found,) = _json("b.json")["speculation"]
    assert (found["acceptance"], found["speedup"], found["prompts"]) == (None, None, {})
    assert set(found["expected_speedups"]) == {"0.6", "0.7", "0.8", "0.85", "0.9", "0.95"}
    assert "random weights: speedups are computed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--speculate", "int5"), "'int5' is not lookup, sparse, int8"),
        (("--draft-tokens", 3), "draft_tokens (flag --draft-tokens) needs speculate"),
        (("--speculate", "int8", "--draft-tokens", 8), "draft"),
        (("--speculate", "int8", "--sparsity", 0.5), "add +sparse to it"),
        (("--speculate", "sparse", "--sparsity", 0), "needs a sparsity above 0"),
        (("--speculate", "int8", "--mode", "intrinsic"), "leave out speculate"),
        (("--speculate", "int8", "--compile", "always"), "leave out compile"),
    ],
    ids=str,
)
def test_what_contradicts_drafts(flags: tuple[object, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _teal("generate", "--prompt", "x", *flags) == 2
    assert said in capsys.readouterr().err


def test_a_batch_of_bench_is_refused_with_drafts(capsys: pytest.CaptureFixture[str]) -> None:
    assert _teal("bench", "--speculate", "int8", "--batch", 2) == 2
    assert "measured on one sequence" in capsys.readouterr().err


def test_from_python_and_yaml(calibrated: Path) -> None:
    dense = teal_cli.load(calibrated, sparsity=0).generate("the stars", max_new_tokens=20)
    model = teal_cli.load(calibrated, speculate="lookup+int8", draft_tokens=3)
    reply = model.reply("the stars", max_new_tokens=20)
    assert reply.text == dense
    assert reply.speculation is not None
    assert reply.speculation.tokens_per_pass >= 1
    assert model.generate("the stars", max_new_tokens=20, temperature=0.9, seed=1) == model.generate(
        "the stars", max_new_tokens=20, temperature=0.9, seed=1
    )
    Path("c.yaml").write_text(f"model: {calibrated}\ngenerate: {{speculate: lookup, prompt: the stars}}\n")
    assert _teal("generate", "--config", "c.yaml", "--max-new-tokens", 20, "--json", "g.json") == 0
    assert _json("g.json")["text"] == dense
