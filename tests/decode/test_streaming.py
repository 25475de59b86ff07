"""Streamed text: what is shown stays, joined it is the tokenizer's decoding, and nothing waits that is settled."""

import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import build_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from teal_cli.decode import streaming
from teal_cli.decode.chat import text_streamer
from teal_cli.decode.streaming import TextStream

_SPECIAL = ["<s>", "</s>", "<unk>"]
_PIECES = (
    *(
        "▁",
        "▁▁",
        "▁the",
        "▁do",
        "▁n",
        "'",
        "t",
        "n't",
        "▁n't",
        "▁'",
        "▁'s",
        "▁ ' ",
        "s",
        "m",
        "v",
        "r",
        "e",
        "ve",
        "▁'ve",
    ),
    *(".", "▁.", ",", "▁,", "!", "▁!", "\n", "é", "日", "\ufffd", "  "),
)
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _vocabulary(words: Any) -> dict[str, int]:
    return {word: number for number, word in enumerate(dict.fromkeys([*_SPECIAL, *words]))}


def _byte_level() -> Any:
    return models.BPE(vocab=_vocabulary(sorted(pre_tokenizers.ByteLevel.alphabet())), merges=[])


def _byte_fallback() -> Any:
    return models.BPE(vocab=_vocabulary([*_BYTES, *_PIECES]), merges=[], byte_fallback=True, unk_token="<unk>")


def _unigram() -> Any:
    return models.Unigram([(word, -1.0) for word in _vocabulary(_PIECES)], 2)


def _word_piece() -> Any:
    words = (piece.replace("▁", "##") for piece in _PIECES if piece.strip("▁ "))
    return models.WordPiece(_vocabulary(["do", "n", "'s", "日", *words]), unk_token="<unk>")


def _words() -> Any:
    return models.WordLevel(_vocabulary(piece.strip("▁") for piece in _PIECES), unk_token="<unk>")


def _suffixed() -> Any:
    return models.BPE(
        vocab=_vocabulary([*(f"{piece}</w>" for piece in _PIECES), *_PIECES]), merges=[], end_of_word_suffix="</w>"
    )


def _llama2(strips: int = 1) -> Any:
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*parts, decoders.Strip(content=" ", left=strips, right=0)])


KINDS: dict[str, tuple[Callable[[], Any], Any]] = {
    "byte level": (_byte_level, decoders.ByteLevel()),
    "byte fallback": (_byte_fallback, _llama2()),
    "byte fallback without strip": (_byte_fallback, _llama2(0)),
    "metaspace": (_unigram, decoders.Metaspace()),
    "word piece": (_word_piece, decoders.WordPiece()),
    "words": (_words, None),
    "suffix": (_suffixed, decoders.BPEDecoder(suffix="</w>")),
}


def _tokenizer(model: Any, decoder: Any, cleans: bool = False) -> Any:
    tokenizer = Tokenizer(model)
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens(_SPECIAL)
    tokenizer.add_tokens([AddedToken(" a tool ", special=False), AddedToken("灯台", special=False)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=cleans
    )
    # Without it transformers does not clean up after BPE.
    made.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = cleans
    return made


def _stream(tokenizer: Any, ids: list[int]) -> tuple[list[str], str, str]:
    """What came while the tokens did, and with the end; and what `end` gives back."""
    pieces: list[str] = []
    stream = text_streamer(tokenizer, pieces.append)
    for token in ids:
        stream.put(torch.tensor([token]))
    early = list(pieces)
    whole = stream.end()
    assert all(pieces)
    return early, "".join(pieces), whole


@pytest.mark.parametrize("cleans", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_joined_it_is_the_decoded_text(kind: str, cleans: bool) -> None:
    """Random tokens, special ones, halves of characters and apostrophes among them."""
    make, decoder = KINDS[kind]
    tokenizer, draws = _tokenizer(make(), decoder, cleans), random.Random(0)
    parts = [*range(len(tokenizer))]
    if kind == "byte level":  # mostly what cleaning is about, and characters of several bytes
        parts = [*parts[::9], *tokenizer.encode(" '.nt sm" * 4 + "é灯🗼")]
    elif kind.startswith("byte fallback"):
        parts = [*parts[:3], *parts[259:], *tokenizer.convert_tokens_to_ids(["<0xE3>", "<0x81>", "<0x82>", "<0x41>"])]
    early = total = 0
    for _ in range(300):
        ids = draws.choices(parts, k=draws.choice([3, 6, 12, 60]))
        before, joined, whole = _stream(tokenizer, ids)
        expected = tokenizer.decode(ids, skip_special_tokens=True)
        assert joined == whole == expected, ids
        early, total = early + len("".join(before)), total + len(expected)
    assert early / total > 0.9


def test_python_tokenizers() -> None:
    """Bytes are local; what joins and mends its words as a whole is shown at the end, and right."""
    byt5 = ByT5Tokenizer()
    text = "灯台 don 't 🗼é"
    early, joined, _ = _stream(byt5, byt5.encode(text, add_special_tokens=False))
    assert joined == "".join(early) == text

    class Mending(PreTrainedTokenizerFast):
        def _decode(self, *args: Any, **kwargs: Any) -> str:
            return super()._decode(*args, **kwargs).replace("@@ ", "")

    mending = Mending(tokenizer_object=Tokenizer(models.WordLevel(_vocabulary(["do@@", "ing"]), unk_token="<unk>")))
    assert _stream(mending, [3, 4]) == ([], "doing", "doing")


@pytest.mark.parametrize(
    "text",
    [
        "ひらがなだけのながいぶんしょう",
        "ภาษาไทยไม่มีช่องว่าง",
        "def f(x):return[x]*2",
        "https://example.org/a?b=c",
        "👩‍👩‍👧🗼",
    ],
)
def test_a_character_is_shown_when_its_last_byte_has_come(text: str) -> None:
    tokenizer = _tokenizer(_byte_level(), decoders.ByteLevel())
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces: list[str] = []
    stream = text_streamer(tokenizer, pieces.append)
    come = b""
    for byte, token in zip(text.encode(), tokenizer.encode(text), strict=True):
        stream.put([token])
        come += bytes([byte])
        assert "".join(pieces) == come.decode(errors="ignore")


def test_only_what_cleaning_can_change_waits() -> None:
    tokenizer = _tokenizer(_unigram(), decoders.Metaspace(), cleans=True)
    seen = []
    stream = text_streamer(tokenizer, lambda text: seen.append(text))
    for piece in ("▁do", "▁n", "'", "t", "▁the", "▁", ".", "▁'", "s"):
        seen.append("|")
        stream.put([tokenizer.convert_tokens_to_ids(piece)])
    stream.end()
    assert "".join(seen) == "|do|||n't| the||.||'s"


def test_what_stands_before_is_not_written_again() -> None:
    tokenizer = build_tokenizer()
    ids = tokenizer.encode(" the 灯台")
    pieces: list[str] = []
    stream = TextStream(tokenizer, pieces.append, before=ids[:-1])
    stream.put(ids[-1:])
    assert (stream.before, pieces, stream.end()) == (" the 灯", ["台"], "台")


def test_work_for_a_token_does_not_grow_with_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words, halves of characters that never become whole, and one run of byte tokens."""
    tokenizer = _tokenizer(_byte_fallback(), _llama2())
    halves = _tokenizer(_byte_level(), decoders.ByteLevel())
    broken = halves.convert_tokens_to_ids(
        pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("é")[0][0][0]
    )
    for made, token in ((tokenizer, tokenizer.convert_tokens_to_ids("▁the")), (halves, broken), (tokenizer, 100)):
        decoded = 0

        class Counting(TextStream):
            def _decode(self, ids: list[int]) -> str:
                nonlocal decoded
                decoded += len(ids)
                return super()._decode(ids)

        stream = Counting(made, lambda text: None)
        started = time.process_time()
        stream.put([token] * 5000)
        assert time.process_time() - started < 5.0
        assert decoded < 5000 * 3 * streaming._WINDOW


def test_what_is_shown_stays_shown_where_it_looks_open_again() -> None:
    """A quote and an n alone: " ' n" may become "'n" or stay, and what was written must not be written twice."""
    vocabulary = ["<unk>", "▁", "▁'", "'", "n", "▁n", "x"]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in vocabulary], unk_id=0))
    tokenizer.decoder = decoders.Metaspace()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", clean_up_tokenization_spaces=True)
    ids = made.convert_tokens_to_ids(["▁'", "▁", "n", "▁", "▁", "n", "▁", "▁'", "▁", "n", "▁'"])
    _, joined, whole = _stream(made, ids)
    assert joined == whole == made.decode(ids)


@pytest.mark.parametrize("after", [["<0xA5>"], ["<0xFF>", "<0x41>"], []])
def test_a_character_that_begins_before_the_stream(after: list[str]) -> None:
    make, decoder = KINDS["byte fallback"]
    tokenizer, pieces = _tokenizer(make(), decoder), list[str]()
    before = tokenizer.convert_tokens_to_ids(["<0x41>", "<0xE6>", "<0x97>"])
    ids = tokenizer.convert_tokens_to_ids(after)
    stream = TextStream(tokenizer, pieces.append, before=before)
    stream.put(ids)
    assert stream.before + stream.end() == stream.before + "".join(pieces) == tokenizer.decode(before + ids)
