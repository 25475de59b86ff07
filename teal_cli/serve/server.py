"""The process: a socket, uvicorn on it, and an end that lets replies under way come to theirs."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from types import FrameType

import uvicorn

from teal_cli.errors import MachineError, UsageError
from teal_cli.ranks.environment import has_launcher
from teal_cli.serve.app import create_app
from teal_cli.serve.service import Service

_BACKLOG = 128
_CONNECTIONS = 1000
"""Open at once; those past them are answered with status 503."""
_KEEP_ALIVE_SECONDS = 30
_LONGEST_HEADERS = 64 << 10
_CUT_SECONDS = 5
"""That clients of replies which were cut get to read so."""
_LAST_SECONDS = 5.0
"""That a step under way may take when everything else has ended."""


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens at nothing yet, so that nobody else can take the address.

    Raises:
        UsageError: no such address.
        MachineError: it is taken, or may not be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as error:
        raise UsageError(f"host (flag --host): {host!r} is no address of this machine ({error})") from error
    found = socket.socket(family, kind, protocol)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that was killed may start again at once
        found.bind(address)
    except OSError as error:
        found.close()
        reason = error.strerror or str(error)
        raise MachineError(f"{host} port {port} cannot be listened at ({reason}): give another --port") from error
    return found


def address_of(listening: socket.socket, host: str) -> str:
    """Where the server is, for people and programs."""
    port = listening.getsockname()[1]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn, which on a signal drains and returns, in place of dying by the signal when it has drained.

    Args:
        config: of uvicorn.
        service: whose replies are cut when the time to drain is over.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handlers of SIGINT and SIGTERM inside the block. Behind it a first rank ends anyway, told again or not."""
        with contextlib.ExitStack() as stack:
            for number in (signal.SIGINT, signal.SIGTERM):
                with contextlib.suppress(ValueError):  # not the main thread
                    before = signal.signal(number, self.handle_exit)
                    stack.callback(signal.signal, number, signal.SIG_IGN if has_launcher() else before)
            yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second ends.

        Of several ranks that is the launcher's matter: whoever tells all processes to end (systemd) tells this one, and
        the launcher, which tells it again.
        """
        if self.should_exit and not has_launcher():
            self.force_exit = True
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain. Replies that take longer are cut first and their clients told; uvicorn would only drop them."""
        cutting = asyncio.get_running_loop().call_later(self._service.config.drain_seconds, self._service.cut)
        try:
            await super().shutdown(sockets)
        finally:
            cutting.cancel()


def make_server(service: Service, key: str | None) -> Server:
    """A server that is not running."""
    config = service.config
    return Server(
        uvicorn.Config(
            create_app(service, key=key),
            log_config=None,
            access_log=False,
            http="h11",
            ws="none",
            lifespan="off",
            loop="asyncio",
            proxy_headers=False,
            server_header=False,
            backlog=_BACKLOG,
            limit_concurrency=_CONNECTIONS,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=config.drain_seconds + _CUT_SECONDS,
            h11_max_incomplete_event_size=_LONGEST_HEADERS,
        ),
        service,
    )


def run(server: Server, service: Service, listening: socket.socket) -> bool:
    """Load and serve, until a signal comes or the model fails.

    Returns:
        Whether the thread of the model ended too. Loading cannot be given up.

    Raises:
        BaseException: what loading or decoding raised.
    """
    with _log_to_stderr():
        service.start()
        server.run(sockets=[listening])
        ended = service.stop(drain=not server.force_exit, seconds=_LAST_SECONDS)
    if service.failure is not None:
        raise service.failure
    return ended


@contextlib.contextmanager
def _log_to_stderr() -> Iterator[None]:
    """To a copy of it: the tokenizers library is kept quiet by turning stderr itself away."""
    try:
        stream = os.fdopen(os.dup(sys.stderr.fileno()), "w", buffering=1, encoding="utf-8", errors="backslashreplace")
    except (OSError, ValueError, AttributeError):  # it is closed, or none of the system's
        yield
        return
    handler = logging.StreamHandler(stream)
    handler.setLevel(logging.ERROR)
    handler.addFilter(_is_ours)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    loggers = [logging.getLogger(name) for name in ("teal_cli.serve", "uvicorn.error")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        stream.close()


def _is_ours(record: logging.LogRecord) -> bool:
    """Whether it says something of the server: what uvicorn says of clients that speak no HTTP, anybody can cause."""
    return not record.getMessage().startswith(("ASGI callable returned without", "Exception in ASGI application"))
