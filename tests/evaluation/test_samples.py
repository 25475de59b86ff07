"""Continuations as text, token by token."""

from conftest import build_tokenizer
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from teal_cli.evaluation.generation import Continuation
from teal_cli.evaluation.samples import sample_of


def test_tokens_together_are_the_text() -> None:
    tokenizer = build_tokenizer()
    prompt, text, other = (tokenizer.encode(words) for words in ("the stars", " fox é 日本 dog", " fox é 日本 fox"))
    choices = [*text[:-1], other[-1]]
    sample = sample_of(tokenizer, Continuation(prompt, other, text, choices))
    assert sample.prompt == "the stars"
    assert "".join(sample.sparse) == " fox é 日本 dog"
    assert "".join(sample.dense) == " fox é 日本 fox"
    assert not any("\ufffd" in piece for piece in sample.sparse)
    assert len(sample.sparse) == len(text)
    assert sample.agrees == [choice == token for choice, token in zip(choices, text, strict=True)]
    assert sample.agrees.count(False) == 1
    assert sample.dense_choices[-1] == sample.dense[-1]


def test_a_broken_character_at_the_end_stays() -> None:
    tokenizer = build_tokenizer()
    text = tokenizer.encode(" 日")[:-1]
    sample = sample_of(tokenizer, Continuation(tokenizer.encode("the"), text, text, text))
    assert "".join(sample.sparse) == tokenizer.decode(tokenizer.encode("the") + text)[3:]
    assert sample.sparse[-1].endswith("\ufffd")


def test_prompt_and_tokens_are_the_text_where_decoding_cleans_up() -> None:
    """A space that the next token takes away belongs to no piece."""
    words = ["<unk>", "do", "n", "'", "t", "not", "stop", "."]
    model = models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), clean_up_tokenization_spaces=True)
    prompt, text = [1, 2], [3, 4, 6, 7, 5]
    sample = sample_of(tokenizer, Continuation(prompt, text, text, text))
    assert sample.prompt + "".join(sample.sparse) == tokenizer.decode(prompt + text)
    assert len(sample.sparse) == len(text)
