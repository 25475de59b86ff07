"""What both endpoints answer with: ids, usage, and a request's replies put together."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from teal_cli.decode.requests import Request
from teal_cli.models.tokenizing import decode
from teal_cli.serve.connection import EventStream, while_connected
from teal_cli.serve.replies import ChosenToken, Piece, Replies, Reply
from teal_cli.serve.schemas import ChatRequest, CompletionRequest
from teal_cli.serve.service import Served, Service

T = TypeVar("T")


@dataclass
class Whole:
    """A reply that has ended."""

    text: str = ""
    tokens: list[ChosenToken] = field(default_factory=list)
    finish: str = ""


async def in_thread(work: Callable[[], T]) -> T:
    """What takes a while, so that the event loop goes on."""
    return await asyncio.get_running_loop().run_in_executor(None, work)


def submit(
    service: Service,
    served: Served,
    requests: Sequence[Request],
    asked: ChatRequest | CompletionRequest,
    *,
    skip_special_tokens: bool = True,
) -> Replies:
    """Hand requests to the scheduler.

    Raises:
        QueueFullError, UsageError: as `Scheduler.submit`.
    """
    stops = asked.stop or []
    replies = [Reply(served.decoder, stops, skip_special_tokens=skip_special_tokens) for _ in requests]
    return Replies(served.scheduler, requests, replies, asked.n or 1, service)


async def whole(replies: Replies) -> list[Whole]:
    """All replies, when they have ended."""
    found = [Whole() for _ in replies.all]
    async for index, piece in replies.pieces():
        add(found[index], piece)
    return found


def add(reply: Whole, piece: Piece) -> None:
    """Put a piece to what there is of a reply."""
    reply.text += piece.text
    reply.tokens += piece.tokens
    reply.finish = piece.finish or reply.finish


async def answered(
    http: HttpRequest,
    replies: Replies,
    asked: ChatRequest | CompletionRequest,
    events: Callable[[], AsyncIterator[dict[str, Any]]],
    body: Callable[[list[Whole]], dict[str, Any]],
) -> Response:
    """A stream of events or one body, as was asked; a client that leaves ends its replies."""
    if asked.stream:
        return EventStream(events(), replies.close)
    try:
        return JSONResponse(body(await while_connected(http.receive, whole(replies))))
    finally:
        replies.close()


def head(kind: str, prefix: str, served: Served) -> dict[str, Any]:
    """How each answer begins."""
    made = {"id": f"{prefix}-{secrets.token_hex(16)}", "object": kind, "created": int(time.time())}
    return {**made, "model": served.name}


def usage_of(replies: Replies, served: Served, sparsity: float | None) -> dict[str, Any]:
    """Tokens of a request, and what `teal` says besides: the level that decoded, and how fast."""
    usage = replies.usage
    level = served.scheduler.levels.default if sparsity is None else sparsity
    usage["teal"] = {"sparsity": level, **usage["teal"]}
    return usage


def usage_so_far(
    replies: Replies, served: Served, asked: ChatRequest | CompletionRequest
) -> dict[str, dict[str, Any] | None]:
    """What an event says of usage before the last one: `usage` of what came, null, or nothing, as was asked."""
    options = asked.stream_options
    if options is None or not options.include_usage:
        return {}
    return {"usage": usage_of(replies, served, asked.sparsity) if options.continuous_usage_stats else None}


def token_text(served: Served, token: int) -> tuple[str, list[int] | None]:
    """A token by itself: its text, and the bytes of it; None where it is no whole character."""
    text = decode(served.decoder, [token])
    return text, None if "\ufffd" in text else list(text.encode("utf-8", "replace"))
