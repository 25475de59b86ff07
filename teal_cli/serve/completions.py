"""POST /v1/completions."""

from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from teal_cli.serve.answers import Whole, answered, head, in_thread, submit, token_text, usage_of, usage_so_far
from teal_cli.serve.replies import ChosenToken, Replies
from teal_cli.serve.requests import check_model, scheduled
from teal_cli.serve.schemas import CompletionRequest
from teal_cli.serve.service import Served, Service


async def completions(http: HttpRequest, asked: CompletionRequest, service: Service) -> Response:
    """Continue texts as they are."""
    served = service.served
    check_model(asked, served)
    prompts = await in_thread(lambda: [_encoded(prompt, served) for prompt in asked.prompts])
    requests = scheduled(asked, prompts, [None] * (asked.n or 1), served, service.config)
    replies = submit(service, served, requests, asked)
    return await answered(
        http,
        replies,
        asked,
        lambda: _events(replies, asked, served),
        lambda wholes: _body(wholes, replies, asked, served),
    )


def _encoded(prompt: str | list[int], served: Served) -> tuple[int, ...]:
    return served.prompts.of_text(prompt) if isinstance(prompt, str) else tuple(prompt)


def _body(wholes: list[Whole], replies: Replies, asked: CompletionRequest, served: Served) -> dict[str, Any]:
    choices = []
    for index, reply in enumerate(wholes):
        logprobs = None if asked.logprobs is None else _Logprobs(served).of(reply.tokens)
        choices.append({"index": index, "text": reply.text, "logprobs": logprobs, "finish_reason": reply.finish})
    usage = usage_of(replies, served, asked.sparsity)
    return {**head("text_completion", "cmpl", served), "choices": choices, "usage": usage}


async def _events(replies: Replies, asked: CompletionRequest, served: Served) -> AsyncIterator[dict[str, Any]]:
    made = head("text_completion", "cmpl", served)
    probabilities = [_Logprobs(served) for _ in replies.all]
    async for index, piece in replies.pieces():
        logprobs = probabilities[index].of(piece.tokens) if piece.tokens else None
        if piece.text or logprobs or piece.finish is not None:
            choice = {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish}
            yield {**made, "choices": [choice], **usage_so_far(replies, served, asked)}
    if asked.stream_options is not None and asked.stream_options.include_usage:
        yield {**made, "choices": [], "usage": usage_of(replies, served, asked.sparsity)}


class _Logprobs:
    """Probabilities of one reply's tokens, with the place of each in the text of them all."""

    def __init__(self, served: Served) -> None:
        self._served, self._offset = served, 0

    def of(self, tokens: list[ChosenToken]) -> dict[str, Any]:
        texts, offsets = [], []
        for token in tokens:
            texts.append(token_text(self._served, token.token)[0])
            offsets.append(self._offset)
            self._offset += len(texts[-1])
        top = [
            {token_text(self._served, token)[0]: max(logprob, -9999.0) for token, logprob in chosen.top}
            for chosen in tokens
        ]
        return {
            "tokens": texts,
            "token_logprobs": [max(chosen.logprob, -9999.0) for chosen in tokens],
            "top_logprobs": top,
            "text_offset": offsets,
        }
