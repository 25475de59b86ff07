"""Tokenizers that come with a model: whatever is wrong in them is one line about the model."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import VOCABULARY, build_tokenizer, save_tiny

from teal_cli.errors import ArtefactError
from teal_cli.models.tokenizing import check_ids, decode, encode, load_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a tokenizer needs of a model folder; the tokenizer has two tokens more than the embedding."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<think>", "<tool>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": VOCABULARY}))
    return tmp_path


def test_text_and_back(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    ids = encode(tokenizer, "count the stars")
    assert ids == build_tokenizer()("count the stars")["input_ids"]
    assert decode(tokenizer, ids) == "count the stars"
    assert decode(tokenizer, [*ids, 1], skip_special_tokens=True) == "count the stars"


def test_tokens_without_an_embedding(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    with pytest.raises(ArtefactError, match=r"'<tool>' \(id 301\) .* 302 tokens .* embedding 300"):
        encode(tokenizer, "a <think> b <tool>")
    check_ids(tokenizer, [0, VOCABULARY - 1])
    with pytest.raises(ArtefactError, match="'<think>' .* not one of the model's"):
        check_ids(tokenizer, [3, VOCABULARY])


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "vocab_size": 299}}, 299),
        ({"model_type": "llama"}, 32_000),
    ],
)
def test_vocabulary_of_a_part_or_of_the_type(folder: Path, config: dict[str, Any], size: int) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    assert load_tokenizer(folder).teal_vocabulary == size


def test_the_saved_model_says_its_vocabulary(tmp_path: Path) -> None:
    assert load_tokenizer(save_tiny(tmp_path / "m")).teal_vocabulary == VOCABULARY


# As the class of tokenizers' panics, which is no Exception.
_Panic = type("PanicException", (BaseException,), {})


@pytest.mark.parametrize("error", [Exception("odd"), KeyError("x"), _Panic("index out of bounds")])
def test_faults_inside(error: BaseException) -> None:
    class Broken:
        def __call__(self, *_: Any, **__: Any) -> Any:
            raise error

        decode = __call__

    with pytest.raises(ArtefactError, match="the model's tokenizer cannot encode"):
        encode(Broken(), "x")
    with pytest.raises(ArtefactError, match="the model's tokenizer cannot decode"):
        decode(Broken(), [1])


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _endless(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def _giant(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.truncate(300 << 20)


def _holding(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_pipe, "not an ordinary file"),
        (_endless, "not an ordinary file"),
        (_giant, "are not read"),
        (_holding("[" * 100_000), "no usable tokenizer|not valid JSON"),
        (_holding("[]"), "no usable tokenizer|does not hold a mapping"),
        (_holding('{"model": '), "no usable tokenizer|not valid JSON"),
    ],
)
def test_files_that_are_no_tokenizer(folder: Path, name: str, damage: Callable[[Path], object], message: str) -> None:
    damage(folder / name)
    with pytest.raises(ArtefactError, match=message) as caught:
        load_tokenizer(folder)
    assert len(str(caught.value)) < 500


def test_giant_chat_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("x" * (2 << 20))
    with pytest.raises(ArtefactError, match="are not read"):
        load_tokenizer(folder)


@pytest.mark.parametrize("part", ["normalizer", "decoder"])
@pytest.mark.parametrize("rules", [[("a", "aa")] * 40, [("a", "a" * 1_000_000)]], ids=["doubles", "writes a million"])
def test_rules_that_multiply_a_text(folder: Path, part: str, rules: list[tuple[str, str]]) -> None:
    file = folder / "tokenizer.json"
    entries = [{"type": "Replace", "pattern": {"String": old}, "content": new} for old, new in rules]
    kind = "normalizers" if part == "normalizer" else "decoders"
    file.write_text(json.dumps({**json.loads(file.read_text()), part: {"type": "Sequence", kind: entries}}))
    with pytest.raises(ArtefactError, match=f"the {part} rules of .* make texts of any length"):
        load_tokenizer(folder)


def test_a_panic_is_one_line(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """tokenizers panics where a rule matches nothing everywhere; Rust's own words would come first."""
    file = folder / "tokenizer.json"
    rule = {"type": "Replace", "pattern": {"Regex": ""}, "content": "a"}
    file.write_text(json.dumps({**json.loads(file.read_text()), "normalizer": rule}))
    tokenizer = load_tokenizer(folder)
    with pytest.raises(ArtefactError, match="cannot encode a text"):
        encode(tokenizer, "a fox")
    assert capfd.readouterr().err == ""
