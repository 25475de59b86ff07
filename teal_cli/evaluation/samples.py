"""Continuations as text, token by token: what a reader of a result can compare by eye."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from teal_cli.evaluation.generation import Continuation
from teal_cli.models.tokenizing import decode

KEPT = 3
"""Samples that a result carries."""
_PART = "\ufffd"
"""What a tokenizer writes for bytes that are not a whole character."""


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
        prompt=decode(tokenizer, found.prompt),
        dense=_pieces(tokenizer, found.prompt, found.dense),
        sparse=_pieces(tokenizer, found.prompt, found.sparse),
        dense_choices=[
            _pieces(tokenizer, found.prompt + found.sparse[:index], [choice])[0]
            for index, choice in enumerate(found.dense_choices)
        ],
        agrees=[choice == token for choice, token in zip(found.dense_choices, found.sparse, strict=True)],
    )


def _pieces(tokenizer: Any, context: Sequence[int], tokens: Sequence[int]) -> list[str]:
    """What each token adds to the text before it.

    A character spread over several tokens goes to the last of them, the others being empty, so that no piece is
    broken; a last character that is not whole stays as it is.
    """
    ids = list(context)
    shown = len(decode(tokenizer, ids).rstrip(_PART))
    pieces = []
    for index, token in enumerate(tokens):
        ids.append(token)
        text = decode(tokenizer, ids)
        whole = text if index == len(tokens) - 1 else text.rstrip(_PART)
        pieces.append(whole[shown:])
        shown = max(shown, len(whole))
    return pieces
