"""A reply that must be a call of a tool: the prompt begins the call, and a schema keeps the reply to the rest of it."""

from collections.abc import Sequence
from typing import Any

from teal_cli.serve.schemas import ChatRequest, NamedTool, Tool
from teal_cli.serve.tool_calls import ToolCall, ToolFormat, calls_of


def tools_to_call(asked: ChatRequest) -> list[Tool]:
    """The tools of which the reply must call one; empty where it need not."""
    tools, choice = asked.tools or [], asked.tool_choice
    if isinstance(choice, NamedTool):
        return [tool for tool in tools if tool.function.name == choice.function.name]
    return tools if choice == "required" else []


def schema_of_call(tools: Sequence[Tool], notation: ToolFormat) -> dict[str, Any]:
    """The JSON schema of a call of one of these tools, as the model writes calls."""
    options: list[dict[str, Any]] = []
    for tool in tools:
        place = f"#{'/items' if notation.in_list else ''}/anyOf/{len(options)}/properties/{notation.arguments}"
        parameters = {key: value for key, value in (tool.function.parameters or {}).items() if key != "$id"}
        arguments = {"type": "object", **_moved(parameters, place)}
        options.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool.function.name}, notation.arguments: arguments},
                "required": ["name", notation.arguments],
                "additionalProperties": False,
            }
        )
    call = {"anyOf": options}
    return {"type": "array", "items": call, "minItems": 1, "maxItems": 1} if notation.in_list else call


_LITERALS = frozenset({"enum", "const", "default", "examples"})
"""Keywords of a schema whose values are no schemas."""
_BY_NAME = frozenset({"properties", "patternProperties", "dependentSchemas", "$defs", "definitions"})
"""Keywords whose values have schemas by names, and a name may be a keyword too."""


def _moved(schema: Any, place: str) -> Any:
    """A schema that becomes a part of another, in which its references to itself point to its new place."""
    if isinstance(schema, list):
        return [_moved(item, place) for item in schema]
    if not isinstance(schema, dict) or isinstance(schema.get("$id"), str):  # what has an id is referred to from there
        return schema
    found = dict(schema)
    for key, value in schema.items():
        if key in _BY_NAME and isinstance(value, dict):
            found[key] = {name: _moved(own, place) for name, own in value.items()}
        elif key not in _LITERALS:
            found[key] = _moved(value, place)
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        found["$ref"] = place + reference.removeprefix("#")
    return found


class ForcedCall:
    """Holds a reply back until it is whole, as `ToolStream` does what may be a call.

    Args:
        tools: of which it calls one.
    """

    def __init__(self, tools: Sequence[Tool]) -> None:
        self._names = {tool.function.name for tool in tools}
        self._held = ""
        self.calls: list[ToolCall] = []
        """Known at the end."""

    def put(self, text: str) -> str:
        """Take a piece; nothing of it is let through."""
        self._held += text
        return ""

    def end(self) -> str:
        """No more comes: the text of a call that was cut, else nothing."""
        self.calls = calls_of(self._held, self._names) or []
        return "" if self.calls else self._held
