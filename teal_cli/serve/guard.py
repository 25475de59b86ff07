"""What every request passes: who it says it talks to, its key, and the headers that every answer carries."""

import hmac
import ipaddress
import logging
from collections.abc import Sequence
from contextlib import suppress

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from teal_cli.serve.connection import ClientLeftError
from teal_cli.serve.errors import ApiError, as_api_error
from teal_cli.serve.metrics import Metrics

log = logging.getLogger(__name__)
OPEN_PATHS = frozenset({"/", "/page.css", "/page.js", "/favicon.ico", "/health"})
"""Need no key: the page asks for it, and says nothing before it has one."""
_METERED = frozenset({"/v1/models", "/v1/chat/completions", "/v1/completions", "/health", "/metrics"})
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


class Guard:
    """Refuses what must not reach the application.

    A page of any other site may make its visitor's browser send requests to this machine: by a name of its own that
    leads here, which the host that is asked for gives away, or openly, which the browser says in `Origin`.

    Args:
        app: comes behind it.
        hosts: names of this server beside localhost and addresses; `*` is any.
        key: that requests must carry; None for none.
        metrics: told of every answer.
    """

    def __init__(self, app: ASGIApp, *, hosts: Sequence[str], key: str | None, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics
        self._hosts = {host.lower().rstrip(".") for host in hosts}
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with an error."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        metered = path if path in _METERED else "other"
        has_begun = False

        async def sending(message: Message) -> None:
            """Send, with our headers. What fails here is the connection: a client that left, or spoke no HTTP."""
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                self._metrics.request(metered, message["status"])
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            try:
                await send(message)
            except Exception as failure:
                raise ClientLeftError from failure

        async def refuse(error: ApiError) -> None:
            await JSONResponse(error.body(), error.status, error.headers)(scope, receive, sending)

        error = self._refusal(path, Headers(scope=scope))
        with suppress(ClientLeftError):
            if error is not None:
                await refuse(error)
                return
            try:
                await self._app(scope, receive, sending)
            except ClientLeftError:
                raise
            except Exception as failure:
                if has_begun:
                    raise
                log.error("a request failed", exc_info=failure)
                await refuse(as_api_error(failure))

    def _refusal(self, path: str, headers: Headers) -> ApiError | None:
        host = headers.get("host", "")
        if not self._is_ours(host):
            return ApiError(
                403, f"this server is not called {host[:100]!r}: see --allowed-hosts", code="host_not_allowed"
            )
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            return ApiError(403, "requests of other sites' pages are not answered", code="origin_not_allowed")
        if self._key is None or path in OPEN_PATHS:
            return None
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and hmac.compare_digest(given.strip().encode("latin-1"), self._key):
            return None
        return ApiError(401, "the key is missing or wrong: send Authorization: Bearer KEY", code="invalid_api_key")

    def _is_ours(self, host: str) -> bool:
        """Whether a request's `Host` can be meant for this server: a name of it, or an address."""
        name = _without_port(host).lower().rstrip(".")
        return "*" in self._hosts or name in self._hosts or name == "localhost" or _is_address(name)


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
