"""Continuations as text, token by token: what a reader of a result can compare by eye."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from teal_cli.decode.streaming import TextStream
from teal_cli.evaluation.generation import Continuation

KEPT = 3
"""Samples that a result carries."""


@dataclass(frozen=True)
class Sample:
    """One prompt and what dense and sparse wrote after it; the tokens of a text put together are the text."""

    prompt: str
    dense: list[str]
    sparse: list[str]
    dense_choices: list[str]
    """What the dense model, fed with the sparse text, would have written in the place of each of its tokens."""
    agrees: list[bool]
    """Whether that is the same token."""


def sample_of(tokenizer: Any, continuation: Continuation) -> Sample:
    """The text of one continuation.

    Args:
        tokenizer: of the model that wrote it.
        continuation: token ids.
    """
    found = continuation
    return Sample(
        prompt=TextStream(tokenizer, lambda piece: None, skip_special_tokens=False, before=found.prompt).before,
        dense=_pieces(tokenizer, found.prompt, found.dense),
        sparse=_pieces(tokenizer, found.prompt, found.sparse),
        dense_choices=[
            _pieces(tokenizer, found.prompt + found.sparse[:index], [choice])[0]
            for index, choice in enumerate(found.dense_choices)
        ],
        agrees=[choice == token for choice, token in zip(found.dense_choices, found.sparse, strict=True)],
    )


def _pieces(tokenizer: Any, context: Sequence[int], tokens: Sequence[int]) -> list[str]:
    """What each token adds to the text before it; put together and behind `context`'s text they are the whole text.

    What a later token can still change goes to a later piece: a character spread over several tokens to the last of
    them, the others being empty. The last piece has the rest, a character that is not whole among it.
    """
    pieces: list[str] = []
    written: list[str] = []
    stream = TextStream(tokenizer, written.append, skip_special_tokens=False, before=context)
    for index, token in enumerate(tokens):
        written.clear()
        stream.put([token])
        if index == len(tokens) - 1:
            stream.end()
        pieces.append("".join(written))
    return pieces
