"""Stop strings, calls of tools, and chat templates in a process of their own."""

import json
import os
import signal
import threading

import pytest
from conftest import CHAT_TEMPLATE, build_tokenizer

pytest.importorskip("fastapi")

from teal_cli.decode.template_process import TemplateProcess
from teal_cli.decode.templating import render
from teal_cli.errors import ArtefactError, UsageError
from teal_cli.serve.errors import ApiError
from teal_cli.serve.prompts import Prompts
from teal_cli.serve.schemas import ChatMessage, Tool
from teal_cli.serve.stop_strings import StopStrings
from teal_cli.serve.tool_calls import FORMATS, ToolCall, format_of, parse_calls
from teal_cli.serve.tool_stream import ToolStream

HERMES, MISTRAL, LLAMA = FORMATS
MESSAGES = [{"role": "user", "content": "hello"}]


def _cuts(text: str) -> list[list[str]]:
    """A text whole, by single characters, and cut once at each place."""
    return [[text], list(text), *([text[:at], text[at:]] for at in range(1, len(text)))]


@pytest.mark.parametrize(
    ("stops", "text", "wanted", "found"),
    [
        ([], "abc", "abc", None),
        (["b"], "abc", "a", "b"),
        (["bc", "c"], "abcd", "a", "bc"),
        (["abcd", "b"], "abcd", "a", "b"),  # the first that is whole
        (["aab"], "aaab!", "a", "aab"),
        (["ab\n"], "xab ab", "xab ab", None),
        (["xyz"], "abxy", "abxy", None),
        (["end"], "end", "", "end"),
    ],
)
def test_a_text_ends_at_a_stop_string(stops: list[str], text: str, wanted: str, found: str | None) -> None:
    for pieces in _cuts(text):
        stream = StopStrings(stops)
        assert "".join([*map(stream.put, pieces), stream.end()]) == wanted
        assert stream.found == found


def test_text_waits_only_while_it_may_be_a_stop_string() -> None:
    stream = StopStrings(["###"])
    assert [stream.put(piece) for piece in ("a#", "b", "##", "c")] == ["a", "#b", "", "##c"]


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (CHAT_TEMPLATE, None),
        ("{% for tool in tools %}{% endfor %}<tool_call>", HERMES),
        ("{{ tools }} [TOOL_CALLS]", MISTRAL),
        ('{{ tools }} respond with {"name": , "parameters": }', LLAMA),
        ("{{ tools }}", None),
        ("<tool_call>", None),
    ],
)
def test_a_template_says_how_tools_are_called(template: str, wanted: object) -> None:
    assert format_of(template) == wanted


_CALL = '{"name": "add", "arguments": {"a": 1, "b": [2, "é"]}}'
_LLAMA_CALL = _CALL.replace("arguments", "parameters")
_ADD = ToolCall("add", json.dumps({"a": 1, "b": [2, "é"]}))


@pytest.mark.parametrize(
    ("notation", "text", "through", "calls"),
    [
        (HERMES, f"I add.\n<tool_call>\n{_CALL}\n</tool_call>", "I add.\n", [_ADD]),
        (HERMES, f"<tool_call>{_CALL}</tool_call>\n<tool_call>{_CALL}</tool_call>", "", [_ADD, _ADD]),
        (HERMES, f"<tool_call>{_CALL}", "", [_ADD]),
        (HERMES, "a <tool_call> nonsense", "a <tool_call> nonsense", []),
        (HERMES, "no call < tool", "no call < tool", []),
        (HERMES, _CALL, _CALL, []),
        (MISTRAL, f"[TOOL_CALLS][{_CALL}, {_CALL}]", "", [_ADD, _ADD]),
        (MISTRAL, '[TOOL_CALLS] [{"x": 1}]', '[TOOL_CALLS] [{"x": 1}]', []),
        (LLAMA, _LLAMA_CALL, "", [_ADD]),
        (LLAMA, f" {_LLAMA_CALL}; {_LLAMA_CALL}", "", [_ADD, _ADD]),
        (LLAMA, f"<|python_tag|>{_LLAMA_CALL}", "", [_ADD]),
        (LLAMA, '{"answer": 42}', '{"answer": 42}', []),
        (LLAMA, '{"name": "Alice", "parameters": {}}', '{"name": "Alice", "parameters": {}}', []),
        (LLAMA, '{"name": "add", "age": 30}', '{"name": "add", "age": 30}', []),
        (HERMES, '<tool_call>{"name": "sub"}', '<tool_call>{"name": "sub"}', []),
        (HERMES, f"<tool_call>{_CALL}</tool_call> and then words", "", [_ADD]),
        (LLAMA, "plain text", "plain text", []),
        (LLAMA, "", "", []),
    ],
)
def test_calls_are_read_from_text(notation, text: str, through: str, calls: list[ToolCall]) -> None:
    for pieces in _cuts(text) if text else [[""]]:
        stream = ToolStream(notation, {"add"})
        assert "".join([*map(stream.put, pieces), stream.end()]) == through
        assert stream.calls == calls


def test_what_is_no_call_is_none() -> None:
    for text in ('{"name": 1}', '{"name": ""}', '{"name": "f", "arguments": 3}', '{"name": "f"', "[" * 100_000, "[1]"):
        assert parse_calls(text, LLAMA, {"f"}) == []
    assert parse_calls('{"name": "f", "arguments": "{}"}', LLAMA, {"f"}, bare=True) == [ToolCall("f", "{}")]
    assert json.loads(ToolCall("f", "{}").to_json()["function"]["arguments"]) == {}


def test_half_a_surrogate_pair_in_a_call_can_be_sent() -> None:
    (call,) = parse_calls('{"name": "f", "arguments": {"a": "\\ud83d"}}', LLAMA, {"f"})
    assert json.loads(json.dumps(call.to_json(), ensure_ascii=False).encode())["function"]["name"] == "f"
    assert parse_calls('{"name": "f", "arguments": "\\ud83d"}', LLAMA, {"f"}) == []


@pytest.mark.parametrize("part", ["tool", "arguments"])
def test_what_is_too_long_once_it_is_rendered_is_not_encoded(tokenizer, part: str) -> None:
    tokenizer.chat_template = "{{ messages }}{{ tools }}"
    long = "y" * 100_000
    function = {"name": "f", "description": long if part == "tool" else ""}
    tool = Tool.model_validate({"type": "function", "function": function})
    called = {"id": "1", "function": {"name": "f", "arguments": long if part == "arguments" else "{}"}}
    message = ChatMessage.model_validate({"role": "assistant", "tool_calls": [called]})
    process = TemplateProcess(tokenizer)
    try:
        with pytest.raises(ApiError, match=r"100,\d+ characters exceed") as caught:
            Prompts(tokenizer, process, 16).of_chat([message], [tool])
        assert caught.value.code == "context_length_exceeded"
    finally:
        process.close()


@pytest.fixture
def tokenizer():
    found = build_tokenizer()
    found.chat_template = CHAT_TEMPLATE
    return found


def test_the_process_renders_as_this_one_does(tokenizer) -> None:
    process = TemplateProcess(tokenizer)
    try:
        texts = []
        threads = [threading.Thread(target=lambda: texts.append(process.render(MESSAGES))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert texts == [render(tokenizer, MESSAGES)] * 4
    finally:
        process.close()
    assert process.render(MESSAGES) == texts[0]  # without it, here


def test_tools_reach_the_template(tokenizer) -> None:
    tokenizer.chat_template = "{% for tool in tools %}{{ tool.function.name }} {% endfor %}{{ messages[0].content }}"
    tools = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in ("add", "sum")]
    process = TemplateProcess(tokenizer)
    try:
        assert process.render(MESSAGES, tools) == "add sum hello"
    finally:
        process.close()


def test_the_process_says_what_is_wrong(tokenizer) -> None:
    tokenizer.chat_template = (
        "{% if messages[0].content == 'no' %}{{ raise_exception('roles must alternate') }}{% endif %}{{ 1 / 0 }}"
    )
    process = TemplateProcess(tokenizer)
    try:
        with pytest.raises(UsageError, match="roles must alternate"):
            process.render([{"role": "user", "content": "no"}])
        with pytest.raises(ArtefactError, match="division by zero"):
            process.render(MESSAGES)
    finally:
        process.close()


def test_a_process_that_died_is_done_without(tokenizer) -> None:
    process = TemplateProcess(tokenizer)
    os.kill(process._child, signal.SIGKILL)
    assert process.render(MESSAGES) == render(tokenizer, MESSAGES)
    assert process.render(MESSAGES) == render(tokenizer, MESSAGES)
