"""From a conversation or a text to the tokens that the model reads."""

import json
import threading
from collections.abc import Sequence
from typing import Any

from teal_cli.decode.template_process import TemplateProcess
from teal_cli.models.tokenizing import encode
from teal_cli.serve.errors import ApiError
from teal_cli.serve.schemas import ChatMessage, Tool


def too_long(tokens: str, positions: int) -> ApiError:
    """What a request is told that does not fit into a slot."""
    return ApiError(
        400,
        f"{tokens} exceed the {positions:,} tokens that this server has for a prompt and its reply",
        code="context_length_exceeded",
    )


class Prompts:
    """Encodes what requests say. Its methods take a while; any thread may call them.

    Args:
        tokenizer: of the model; nobody else encodes with it.
        templates: renders its chat template; None where chats are not served.
        positions: tokens that a prompt and its reply may have.
    """

    def __init__(self, tokenizer: Any, templates: TemplateProcess | None, positions: int) -> None:
        self._tokenizer, self._templates, self._positions = tokenizer, templates, positions
        self._lock = threading.Lock()  # the tokenizers library refuses two threads at once
        self._longest_token = max(map(len, tokenizer.get_vocab()), default=1)

    def of_chat(
        self, messages: Sequence[ChatMessage], tools: Sequence[Tool] | None, begun: str = ""
    ) -> tuple[int, ...]:
        """The tokens of a conversation, and of what the reply has begun with.

        Raises:
            ApiError: longer than a slot, or a model without a chat template.
            UsageError: the template refuses the conversation.
            ArtefactError: the template or the tokenizer fails.
        """
        if self._templates is None:
            raise ApiError(400, "chats are not served here: this model has no chat template; use /v1/completions")
        self._check_characters(sum(len(message.text) for message in messages))
        text = self._templates.render(
            [_as_template_wants(message) for message in messages],
            [tool.model_dump(exclude_none=True) for tool in tools] if tools else None,
        )
        text += begun
        self._check_characters(len(text))  # tools, calls and the template's own words are in it too
        return self._encoded(text, add_special_tokens=False)  # the template writes them itself

    def of_text(self, text: str) -> tuple[int, ...]:
        """The tokens of a text, as it is.

        Raises:
            ApiError: longer than a slot, or empty.
            ArtefactError: the tokenizer fails.
        """
        self._check_characters(len(text))
        found = self._encoded(text)
        if not found:
            raise ApiError(400, "the prompt has no tokens", param="prompt")
        return found

    def _encoded(self, text: str, **options: Any) -> tuple[int, ...]:
        with self._lock:
            return tuple(encode(self._tokenizer, text, **options))

    def _check_characters(self, characters: int) -> None:
        """Refuse what is too long whatever its tokens: encoding 10 MB takes many seconds."""
        if characters > self._positions * self._longest_token:
            raise too_long(f"{characters:,} characters", self._positions)


def _as_template_wants(message: ChatMessage) -> dict[str, Any]:
    """As chat templates of transformers read messages: arguments of calls are objects, and parts are one text."""
    found: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    found["content"] = message.text
    if message.name is not None:
        found["name"] = message.name
    if message.tool_call_id is not None:
        found["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        found["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return found


def _arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
