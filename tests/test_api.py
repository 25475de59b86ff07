"""The six functions of the Python API, on a tiny model; the examples of docs/python-api.md."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import copied
from conftest import save_tiny, write_corpus
from transformers.utils import logging

import teal_cli
from teal_cli.cli import run
from teal_cli.cli.generate import summary
from teal_cli.errors import ArtefactError, UsageError
from teal_cli.sparse import sparse_layers

PAGE = Path(__file__).parents[1] / "docs" / "python-api.md"


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "tiny", chat=True)


@pytest.fixture(scope="module")
def calibrated_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("calibrated")
    model, corpus = save_tiny(home / "tiny", chat=True), write_corpus(home / "corpus.txt")
    found = teal_cli.calibrate(model, dataset=str(corpus), tokens=512, seq_len=64, runs=home / "runs")
    assert (found.info.tokens, len(found.histograms)) == (512, 9)
    return home


@pytest.fixture
def calibrated(calibrated_home: Path, tmp_path: Path) -> Path:
    return copied(calibrated_home, tmp_path)


def test_names_are_there_and_come_late() -> None:
    """Importing the package costs nothing, and its names are found by completion before they are used."""
    code = (
        "import sys, teal_cli\n"
        "assert {'load', 'calibrate', 'export', 'evaluate', 'generate'} <= set(dir(teal_cli))\n"
        "assert 'torch' not in sys.modules\n"
        "for name in teal_cli.__all__[1:]:\n    assert callable(getattr(teal_cli, name)), name\n"
        "import teal_cli.evaluation.perplexity\n"
        "assert callable(teal_cli.evaluate)\n"
        "from teal_cli import evaluate\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="'lod'"):
        _ = teal_cli.lod


def test_the_chain_is_that_of_the_command_line(calibrated: Path, corpus: Path) -> None:
    exported = teal_cli.export(calibrated, sparsity=0.4)
    assert exported.folder == "runs/tiny/fisher-0.40"
    result = teal_cli.evaluate(exported.folder, text=str(corpus), tokens=256, seq_len=64)
    flags = ["eval", "--model", exported.folder, "--text", str(corpus), "--tokens", "256", "--seq-len", "64"]
    assert run([*flags, "--json", "e.json"]) == 0
    written = result.to_json()
    read = json.loads(Path("e.json").read_text())
    assert {key: read[key] for key in written} == written


def test_a_model_answers(calibrated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logging.enable_progress_bar()  # as it is where no command line has run
    capsys.readouterr()
    model = teal_cli.load(calibrated, sparsity=0.5, max_new_tokens=6)
    assert model.sparsity == 0.5
    assert len(sparse_layers(model.model)) == 15
    assert model.tokenizer.decode([5])
    pieces: list[str] = []
    reply = model.reply("the stars", pieces.append)
    assert "".join(pieces) == reply.text
    assert reply.tokens == 6
    assert 0.2 < (reply.realised_sparsity or 0.0) < 0.8
    assert model.generate("the stars") == reply.text
    assert model.generate([{"role": "user", "content": "the stars"}]) == reply.text
    assert model.reply(" the stars\n").prompt_tokens > reply.prompt_tokens  # a prompt is taken as it is
    assert model.reply("the stars", max_new_tokens=3).tokens == 3
    assert model.reply("the stars").tokens == 6  # the options of one reply are not kept
    assert teal_cli.generate("the stars", calibrated, 0.5, max_new_tokens=6) == reply.text
    sampled = {model.generate("the stars", temperature=2.0, seed=seed) for seed in (10, 20, 30)}
    assert len(sampled) > 1
    assert len({model.generate("the stars", temperature=2.0, seed=3) for _ in range(3)}) == 1
    assert capsys.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled()


def test_dense_and_what_is_missing_is_made(dense: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert teal_cli.load(dense, sparsity=0).sparsity == 0.0
    assert not Path("runs").exists()
    teal_cli.calibrate(dense, dataset=str(corpus), tokens=256, seq_len=64)
    assert teal_cli.load(dense, quiet=False).sparsity == 0.5
    assert "exporting it" in capsys.readouterr().err


def test_mistakes(dense: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown key 'tokns'.*did you mean 'tokens'"):
        teal_cli.calibrate(dense, tokns=5)
    with pytest.raises(UsageError, match="below 1"):
        teal_cli.export(dense, sparsity=1.0)
    with pytest.raises(UsageError, match="json is for the command line"):
        teal_cli.evaluate(dense, json="x.json")
    with pytest.raises(ArtefactError, match="no model"):
        teal_cli.load("nothing-like-it")
    model = teal_cli.load(dense, sparsity=0)
    with pytest.raises(UsageError, match=r"'top_q' is not an option of a reply; did you mean 'top_p'"):
        model.generate("x", top_q=0.5)
    with pytest.raises(UsageError, match="need a temperature above 0"):
        model.generate("x", top_p=0.5)
    for nothing in (" ", [], [{"role": "user", "content": "\n"}]):
        with pytest.raises(UsageError, match="is empty"):
            model.generate(nothing)
    for message in ({"role": "user"}, {"role": "user", "content": None}, {"content": "x"}, "x"):
        with pytest.raises(UsageError, match="a message is"):
            model.generate([message, {"role": "user", "content": "x"}])
    with pytest.raises(ArtefactError, match="exceed the model's context"):
        model.generate("x", max_new_tokens=300)
    model.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UsageError, match="does not take this conversation: roles must alternate"):
        model.generate("x")


def test_an_interrupted_reply_raises(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = teal_cli.load(dense, sparsity=0)

    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate("the stars", interrupt, max_new_tokens=20)


def test_a_reply_without_tokens_took_its_prefill(dense: Path) -> None:
    model = teal_cli.load(dense, sparsity=0)
    model._generator.stop = frozenset(range(len(model.tokenizer)))
    found = model.reply("the stars", max_new_tokens=20)
    assert (found.tokens, found.text, found.tokens_per_second) == (0, "", None)
    assert found.prefill_seconds > 0.0
    assert summary(found) == f"0 tokens, prefill of {found.prompt_tokens} in {found.prefill_seconds:.2f} s"


def test_a_reply_of_one_token_has_no_step_to_be_dense(calibrated: Path) -> None:
    model = teal_cli.load(calibrated, sparsity=0.5)
    one, two = (model.reply("the stars", max_new_tokens=count) for count in (1, 2))
    assert summary(one).startswith("1 token, prefill of ")
    assert "sparsity" not in summary(one)
    assert "dense" not in summary(one)
    assert summary(two).startswith("2 tokens, ")
    assert summary(two).endswith(f"realised sparsity {two.realised_sparsity:.3f}")


@torch.no_grad()
def test_examples_of_the_page(dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every block, in order, in one session, on a tiny model and little text."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 6
    smaller = {'"smollm2-135m"': repr(str(dense)), "tokens=8192": "tokens=512, seq_len=64"}
    smaller["tokens=4096"] = "tokens=256, seq_len=64"
    calibrated = teal_cli.calibrate(dense, tokens=512, seq_len=64)  # what load would do, on less
    assert calibrated.info.dataset == "sotu"
    scope: dict[str, object] = {}
    for block in blocks:
        for long, short in smaller.items():
            block = block.replace(long, short)
        exec(compile(block, str(PAGE), "exec"), scope)  # noqa: S102
    printed = capsys.readouterr().out
    assert "512 tokens, 9 sites" in printed
    assert "runs/tiny/fisher-0.40" in printed
    assert printed.splitlines()[-1] == "LlamaForCausalLM"
