"""Replies that must be a call of a tool: what OpenAI's client gets, and the schemas that such replies are kept to."""

import json
from collections.abc import Iterator
from pathlib import Path

import live_server
import openai
import pytest
from conftest import CHAT_TEMPLATE
from live_server import Live, serving
from openai import OpenAI

from teal_cli.models.tokenizing import load_tokenizer
from teal_cli.serve.forced_calls import ForcedCall, schema_of_call
from teal_cli.serve.schemas import Tool
from teal_cli.serve.tool_calls import FORMATS

pytest.importorskip("llguidance")
calibrated = pytest.fixture(scope="module")(live_server.calibrated)
client = pytest.fixture(live_server.client)

HELLO = [{"role": "user", "content": "the quick brown fox"}]
_PLACE = {"$ref": "#/$defs/Place"}
GO = {
    "type": "function",
    "function": {
        "name": "go",
        "parameters": {
            "properties": {"where": _PLACE},
            "required": ["where"],
            "additionalProperties": False,
            "$defs": {"Place": {"enum": ["home", "away"]}},
        },
    },
}
STOP = {
    "type": "function",
    "function": {"name": "stop", "parameters": {"type": "object", "additionalProperties": False}},
}
TOOLS = [GO, STOP]


@pytest.fixture(scope="module")
def live(calibrated: Path) -> Iterator[Live]:
    """A server whose model's chat template knows of tools."""
    tokenizer = load_tokenizer(calibrated / "tiny")
    tokenizer.chat_template = f"{{% if tools %}}<tool_call>{{{{ tools }}}}{{% endif %}}{CHAT_TEMPLATE}"
    tokenizer.save_pretrained(calibrated / "tiny")
    with serving(calibrated / "tiny", calibrated / "runs", sparsity=[0.5], context=512) as found:
        yield found


def _ask(client: OpenAI, live: Live, tool_choice: object, **options):
    asked = {"model": live.name, "messages": HELLO, "tools": TOOLS, "max_tokens": 60, "temperature": 0}
    return client.chat.completions.create(**{**asked, "tool_choice": tool_choice, **options})


def _named(name: str) -> dict:
    return {"type": "function", "function": {"name": name}}


def _is_of_its_tool(name: str, arguments: str) -> bool:
    value = json.loads(arguments)
    return value in ({"where": "home"}, {"where": "away"}) if name == "go" else value == {}


@pytest.mark.parametrize("name", ["go", "stop"])
def test_a_named_function_is_called(live: Live, client: OpenAI, name: str) -> None:
    choice = _ask(client, live, _named(name)).choices[0]
    (call,) = choice.message.tool_calls
    assert call.function.name == name
    assert _is_of_its_tool(name, call.function.arguments)
    assert (choice.message.content, choice.finish_reason) == (None, "tool_calls")


def test_some_function_is_called_where_one_is_required(live: Live, client: OpenAI) -> None:
    called = set()
    replies = _ask(client, live, "required", n=8, temperature=1.5, seed=0)
    for choice in replies.choices:
        (call,) = choice.message.tool_calls
        assert _is_of_its_tool(call.function.name, call.function.arguments)
        called.add(call.function.name)
    assert called == {"go", "stop"}
    assert _ask(client, live, "auto").choices[0].message.tool_calls is None  # of its own will it calls none


def test_a_stream_has_the_same_call(live: Live, client: OpenAI) -> None:
    whole = _ask(client, live, "required").choices[0].message.tool_calls[0].function
    chunks = list(_ask(client, live, "required", stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    (calls,) = [delta.tool_calls for delta in deltas if delta.tool_calls]
    assert (calls[0].function.name, calls[0].function.arguments) == (whole.name, whole.arguments)
    assert not any(delta.content for delta in deltas)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_call_that_is_cut_is_text(live: Live, client: OpenAI) -> None:
    choice = _ask(client, live, _named("go"), max_tokens=4).choices[0]
    assert choice.message.tool_calls is None
    assert '{"name":"go"'.startswith(choice.message.content[:12])
    assert choice.finish_reason == "length"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tool_choice": "required", "tools": []}, "required goes with tools"),
        ({"tool_choice": _named("fly")}, "'fly', which is none of tools"),
        ({"tool_choice": "always"}, "tool_choice"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "objekt"}}}]},
            "cannot be followed",
        ),
    ],
)
def test_what_cannot_be_called_is_refused(live: Live, client: OpenAI, options: dict, said: str) -> None:
    with pytest.raises(openai.BadRequestError, match=said):
        _ask(client, live, **{"tool_choice": "required", **options})


@pytest.mark.parametrize("notation", FORMATS, ids=lambda notation: notation.name)
def test_schemas_have_the_form_of_the_notation(notation) -> None:
    schema = schema_of_call([Tool.model_validate(tool) for tool in TOOLS], notation)
    if notation.name == "mistral":
        assert (schema["type"], schema["minItems"], schema["maxItems"]) == ("array", 1, 1)
        schema, begin = schema["items"], "#/items"
    else:
        begin = "#"
    key = "parameters" if notation.name == "llama" else "arguments"
    assert [option["properties"]["name"]["const"] for option in schema["anyOf"]] == ["go", "stop"]
    moved = schema["anyOf"][0]["properties"][key]
    assert moved["type"] == "object"
    assert moved["properties"]["where"]["$ref"] == f"{begin}/anyOf/0/properties/{key}/$defs/Place"


def test_references_are_moved_where_they_are_references() -> None:
    """Not in values, nor below an id of its own; a parameter may have a keyword's name."""
    literal, own = {"$ref": "#/x"}, {"$id": "https://example.org/own", "$ref": "#/$defs/Own", "$defs": {"Own": True}}
    parameters = {
        "$id": "https://example.org/go",
        "properties": {"default": _PLACE, "where": {**_PLACE, "default": literal, "examples": [literal]}, "own": own},
        "enum": [literal],
        "$defs": {"Place": {"const": literal}},
    }
    tool = Tool.model_validate({"type": "function", "function": {"name": "go", "parameters": parameters}})
    moved = schema_of_call([tool], FORMATS[0])["anyOf"][0]["properties"]["arguments"]
    place = {"$ref": "#/anyOf/0/properties/arguments/$defs/Place"}
    assert moved == {
        "type": "object",
        "properties": {"default": place, "where": {**place, "default": literal, "examples": [literal]}, "own": own},
        "enum": [literal],
        "$defs": {"Place": {"const": literal}},
    }


def test_only_the_tools_that_may_be_called_are() -> None:
    stream = ForcedCall([Tool.model_validate(GO)])
    assert stream.put('{"name": "stop", "arguments": {}}') == ""
    assert stream.end() == '{"name": "stop", "arguments": {}}'
    assert stream.calls == []
