"""Prompts and replies: chat templates and stop tokens."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from teal_cli.decode.streaming import text_streamer
from teal_cli.errors import UsageError

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
        UsageError: a conversation that the template does not know, such as of other roles.
    """
    from jinja2 import TemplateError

    if not chat:
        ids = tokenizer(messages[-1]["content"], return_tensors="pt")["input_ids"]
        return torch.as_tensor(ids, dtype=torch.int64)
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise UsageError(f"the model's chat template does not take this conversation: {error}") from error
    # The template writes the special tokens itself.
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    return torch.as_tensor(ids, dtype=torch.int64)


def stop_ids(model: Any, tokenizer: Any, further: Iterable[str] = ()) -> frozenset[int]:
    """Every token that ends a reply: the model's, the tokenizer's, and those the user named.

    Raises:
        UsageError: a named token that the vocabulary does not have.
    """
    ids: set[int] = set()
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        value = getattr(source, "eos_token_id", None)
        if isinstance(value, int):
            ids.add(value)
        elif isinstance(value, list | tuple):
            ids.update(value)
    for text in further:
        encoded = tokenizer.encode(text, add_special_tokens=False)
        if len(encoded) != 1:
            raise UsageError(f"stop (flag --stop): {text!r} is not one token of this model but {len(encoded)}")
        ids.add(encoded[0])
    return frozenset(ids)
