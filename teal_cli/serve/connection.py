"""The client's side of a connection: its requests, read within bounds, and answers that end when it leaves."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from teal_cli.serve.errors import ApiError, as_api_error

T = TypeVar("T")
log = logging.getLogger(__name__)
_BODY_SECONDS = 30.0
"""That a client may take to send a request."""
_SEND_SECONDS = 60.0
"""After which a client that does not read is given up."""
_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


class ClientLeftError(Exception):
    """Nobody is there to answer."""


async def read_body(request: Request, most: int) -> bytes:
    """The whole body of a request, which must be said to be JSON.

    A page of another site cannot say that of what it makes a browser send without asking this server first.

    Raises:
        ApiError: of another type, too large, or too slow.
        ClientLeftError: the client left.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "the body must be JSON: send Content-Type: application/json", code="content_type")
    too_large = ApiError(413, f"the body has more than the {most:,} bytes that this server takes", code="too_large")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > most:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientLeftError
                body += message.get("body", b"")
                if len(body) > most:
                    raise too_large
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {_BODY_SECONDS:.0f} s", code="too_slow") from None


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns, unless the client leaves first, which ends it.

    Args:
        receive: of a request whose body was read.
        work: not begun.

    Raises:
        ClientLeftError: the client left.
    """
    leaving = asyncio.ensure_future(_left(receive))
    working = asyncio.ensure_future(work)
    try:
        await asyncio.wait((leaving, working), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientLeftError
        return working.result()
    finally:
        for task in (leaving, working):
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events, each a JSON value, and `[DONE]` after the last.

    What goes wrong on the way is an event too, as OpenAI's clients expect it.

    Args:
        events: JSON values.
        close: called at the end, whatever the end was.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[dict[str, Any]], close: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._close = events, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them while the client is there."""
        try:
            await while_connected(receive, self._send(send))
        except ClientLeftError:
            pass
        finally:
            self._close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for event in self._events:
                await _write(send, _line(_JSON.encode(event)))
            await _write(send, _line("[DONE]"))
        except (ClientLeftError, asyncio.CancelledError):
            raise
        except Exception as error:
            known = as_api_error(error)
            if not isinstance(error, ApiError):
                log.exception("a stream failed", exc_info=error)
            await _write(send, _line(json.dumps(known.body())))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _line(data: str) -> bytes:
    return f"data: {data}\n\n".encode("utf-8", "replace")


async def _write(send: Send, data: bytes) -> None:
    try:
        async with asyncio.timeout(_SEND_SECONDS):
            await send({"type": "http.response.body", "body": data, "more_body": True})
    except (TimeoutError, OSError):
        raise ClientLeftError from None
