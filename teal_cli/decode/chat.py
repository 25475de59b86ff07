"""Prompts and replies: chat templates and stop tokens."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from teal_cli.decode.streaming import text_streamer
from teal_cli.decode.templating import render
from teal_cli.errors import UsageError, shown
from teal_cli.models.tokenizing import encode

__all__ = ["Message", "encode_prompt", "stop_ids", "text_streamer", "wants_chat"]

Message = dict[str, str]
"""{"role": "user" or "assistant", "content": text}"""


def wants_chat(tokenizer: Any, chat: bool | None) -> bool:
    """Whether to use the chat template: as asked, or if there is one.

    Raises:
        UsageError: --chat for a model without a template.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has_template:
        raise UsageError("--chat: this model has no chat template; use --no-chat")
    return has_template if chat is None else chat


def encode_prompt(tokenizer: Any, messages: list[Message], chat: bool) -> Tensor:
    """(1, tokens) int64 of a conversation; without the template, of its last message alone.

    Raises:
        UsageError: a conversation that the template refuses, such as of other roles.
        ArtefactError: a template or tokenizer that fails, or a token that the model does not have.
    """
    if chat:
        # The template writes the special tokens itself.
        ids = encode(tokenizer, render(tokenizer, messages), add_special_tokens=False)
    else:
        ids = encode(tokenizer, messages[-1]["content"])
    return torch.tensor([ids], dtype=torch.int64)


def stop_ids(model: Any, tokenizer: Any, further: Iterable[str] = ()) -> frozenset[int]:
    """Every token that ends a reply: the model's, the tokenizer's, and those the user named.

    Raises:
        UsageError: a named token that the vocabulary does not have.
        ArtefactError: one that the tokenizer has and the model has not.
    """
    ids: set[int] = set()
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        value = getattr(source, "eos_token_id", None)
        ids.update(each for each in (value if isinstance(value, list | tuple) else [value]) if isinstance(each, int))
    for text in further:
        encoded = encode(tokenizer, text, add_special_tokens=False)
        if len(encoded) != 1:
            raise UsageError(f"stop (flag --stop): {shown(text)} is not one token of this model but {len(encoded)}")
        ids.add(encoded[0])
    return frozenset(ids)
