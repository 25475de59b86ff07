"""Calls of tools in what a model wrote: three notations, told apart by the model's chat template."""

import json
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ToolFormat:
    """How a model writes calls."""

    name: str
    begins: tuple[str, ...]
    """Strings that begin a call; text before them is the answer."""
    ends: str = ""
    """What closes it."""
    bare: bool = False
    """Whether a reply may also be a call from its first character on, without a mark."""
    opens: str = ""
    """What stands before the JSON of a reply that must be a call."""
    arguments: str = "arguments"
    """The key of the arguments."""
    in_list: bool = False
    """Whether calls are items of a list."""


FORMATS = (
    ToolFormat("hermes", ("<tool_call>",), "</tool_call>", opens="<tool_call>\n"),  # Qwen, SmolLM 3, Hermes
    ToolFormat("mistral", ("[TOOL_CALLS]",), opens="[TOOL_CALLS]", in_list=True),
    ToolFormat("llama", ("<|python_tag|>",), bare=True, arguments="parameters"),
)


@dataclass(frozen=True)
class ToolCall:
    """A call that a model wants made."""

    name: str
    arguments: str
    """JSON of an object."""

    def to_json(self) -> dict[str, Any]:
        """As OpenAI's API has it, with an id of its own."""
        call = {"name": self.name, "arguments": self.arguments}
        return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": call}


def format_of(template: str) -> ToolFormat | None:
    """The notation that a chat template tells its model to use; None where it knows nothing of tools, or of no such.

    Args:
        template: its source.
    """
    if "tools" not in template:
        return None
    for known in FORMATS:
        if any(mark in template for mark in known.begins):
            return known
    return next((known for known in FORMATS if known.bare and '"parameters"' in template), None)


def begins_bare(text: str) -> bool:
    """Whether a text that is not whole yet may be a call without a mark."""
    return text.lstrip()[:1] in ("", "{")


def parse_calls(text: str, notation: ToolFormat, names: Collection[str], *, bare: bool = False) -> list[ToolCall]:
    """The calls in what follows a mark (or in a whole reply, where marks are not needed); empty where it is none.

    Args:
        text: from the first mark on.
        notation: how they are written. What follows the mark that closes a call is dropped.
        names: of the tools that may be called. JSON with another name is an answer that happens to have a name.
        bare: whether there is no mark; then a call is only what has arguments.
    """
    pieces = [text]
    for mark in notation.begins:
        pieces = [part for piece in pieces for part in piece.split(mark)]
    if notation.ends:
        pieces = [piece.partition(notation.ends)[0] for piece in pieces]
    calls: list[ToolCall] = []
    for piece in filter(str.strip, pieces):
        found = calls_of(piece, names, bare=bare)
        if found is None:
            return []
        calls += found
    return calls


def calls_of(text: str, names: Collection[str], *, bare: bool = True) -> list[ToolCall] | None:
    """Calls of JSON values one after another, with `;` or white space between; None where one is no call.

    Args:
        text: has no marks.
        names: of the tools that may be called.
        bare: whether a call must have arguments.
    """
    decoder, at, calls = json.JSONDecoder(), 0, list[ToolCall]()
    while at < len(text):
        if text[at].isspace() or text[at] == ";":
            at += 1
            continue
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return None
        for one in value if isinstance(value, list) else [value]:
            call = _call(one, names, bare)
            if call is None:
                return None
            calls.append(call)
    return calls


def _call(value: object, names: Collection[str], bare: bool) -> ToolCall | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or value["name"] not in names:
        return None
    if bare and "arguments" not in value and "parameters" not in value:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        return ToolCall(value["name"], arguments) if _is_text(arguments) else None
    # In ASCII, since a model may have written half a surrogate pair, which UTF-8 has no bytes for.
    return ToolCall(value["name"], json.dumps(arguments)) if isinstance(arguments, dict) else None


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
