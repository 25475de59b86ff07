"""POST /v1/chat/completions."""

from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from teal_cli.decode.requests import Mask
from teal_cli.serve.answers import Whole, answered, head, in_thread, submit, token_text, usage_of, usage_so_far
from teal_cli.serve.errors import ApiError
from teal_cli.serve.forced_calls import ForcedCall, schema_of_call, tools_to_call
from teal_cli.serve.replies import ChosenToken, Replies
from teal_cli.serve.requests import check_model, scheduled
from teal_cli.serve.schemas import ChatRequest
from teal_cli.serve.service import Served, Service
from teal_cli.serve.tool_calls import ToolFormat
from teal_cli.serve.tool_stream import ToolStream


async def chat(http: HttpRequest, asked: ChatRequest, service: Service) -> Response:
    """Answer a conversation."""
    served = service.served
    check_model(asked, served)
    tools = asked.tools if asked.tool_choice != "none" else None
    notation = _notation(served) if tools else None
    begun = notation.opens if notation is not None and tools_to_call(asked) else ""
    prompt, masks = await in_thread(
        lambda: (served.prompts.of_chat(asked.messages, tools, begun), _masks(asked, served, notation))
    )
    requests = scheduled(asked, [prompt], masks, served, service.config)
    # Marks of calls may be special tokens, which texts are without.
    replies = submit(service, served, requests, asked, skip_special_tokens=notation is None)
    return await answered(
        http,
        replies,
        asked,
        lambda: _events(replies, asked, served, notation),
        lambda wholes: _body(wholes, replies, asked, served, notation),
    )


def _notation(served: Served) -> ToolFormat:
    if served.tools is None:
        raise ApiError(400, "this model's chat template has no tools, or none that this server reads", param="tools")
    return served.tools


def _masks(asked: ChatRequest, served: Served, notation: ToolFormat | None) -> list[Mask | None]:
    """One for each of the `n` replies; takes a while."""
    schema, param = None, "response_format"
    if asked.response_format is not None:
        schema = asked.response_format.schema_of_reply
    if notation is not None and (forced := tools_to_call(asked)):
        schema, param = schema_of_call(forced, notation), "tools"
    return [None if schema is None else served.grammars.mask(schema, param) for _ in range(asked.n or 1)]


def _calls(asked: ChatRequest, notation: ToolFormat) -> ToolStream | ForcedCall:
    """Finds the calls in a reply."""
    if forced := tools_to_call(asked):
        return ForcedCall(forced)
    return ToolStream(notation, {tool.function.name for tool in asked.tools or ()})


def _body(
    wholes: list[Whole], replies: Replies, asked: ChatRequest, served: Served, notation: ToolFormat | None
) -> dict[str, Any]:
    choices = []
    for index, reply in enumerate(wholes):
        message: dict[str, Any] = {"role": "assistant", "content": reply.text, "refusal": None}
        finish = reply.finish
        if notation is not None:
            stream = _calls(asked, notation)
            text = stream.put(reply.text) + stream.end()
            if stream.calls:
                message["content"] = text.strip() or None
                message["tool_calls"] = [call.to_json() for call in stream.calls]
                finish = "tool_calls"
        choice = {"index": index, "message": message, "logprobs": None, "finish_reason": finish}
        if asked.logprobs:
            choice["logprobs"] = _logprobs(served, reply.tokens)
        choices.append(choice)
    usage = usage_of(replies, served, asked.sparsity)
    return {**head("chat.completion", "chatcmpl", served), "choices": choices, "usage": usage}


async def _events(
    replies: Replies, asked: ChatRequest, served: Served, notation: ToolFormat | None
) -> AsyncIterator[dict[str, Any]]:
    made = head("chat.completion.chunk", "chatcmpl", served)

    def event(index: int, delta: dict[str, Any], finish: str | None = None, logprobs: Any = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**made, "choices": [choice], **usage_so_far(replies, served, asked)}

    for index in range(len(replies.all)):
        yield event(index, {"role": "assistant", "content": ""})
    streams = [None if notation is None else _calls(asked, notation) for _ in replies.all]
    async for index, piece in replies.pieces():
        stream = streams[index]
        text = piece.text if stream is None else stream.put(piece.text)
        finish = piece.finish
        if stream is not None and finish is not None:
            text += stream.end()
        logprobs = _logprobs(served, piece.tokens) if piece.tokens else None
        if text or logprobs:
            yield event(index, {"content": text}, logprobs=logprobs)
        if stream is not None and finish is not None and stream.calls:
            finish = "tool_calls"
            calls = [{"index": number, **call.to_json()} for number, call in enumerate(stream.calls)]
            yield event(index, {"tool_calls": calls})
        if finish is not None:
            yield event(index, {}, finish)
    if asked.stream_options is not None and asked.stream_options.include_usage:
        yield {**made, "choices": [], "usage": usage_of(replies, served, asked.sparsity)}


def _logprobs(served: Served, tokens: list[ChosenToken]) -> dict[str, Any]:
    return {"content": [_entry(served, token) for token in tokens], "refusal": None}


def _entry(served: Served, chosen: ChosenToken) -> dict[str, Any]:
    top = [_probable(served, token, logprob) for token, logprob in chosen.top]
    return {**_probable(served, chosen.token, chosen.logprob), "top_logprobs": top}


def _probable(served: Served, token: int, logprob: float) -> dict[str, Any]:
    text, utf8 = token_text(served, token)
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": utf8}
