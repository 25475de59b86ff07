"""Chat templates of a server: rendered by a small process, which is forked before the weights are loaded.

`templating.render` forks for each conversation. A fork copies page tables, the more the more memory there is, and all
that the process does waits for it.
"""

import json
import os
import signal
import socket
import struct
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from teal_cli.decode.templating import close_all_but, render
from teal_cli.errors import ArtefactError, TealError, UsageError

_LENGTH = struct.Struct("!Q")
_TEXT, _REFUSED, _FAILED = b"t", b"r", b"f"
_PIECE = 1 << 20


class TemplateProcess:
    """Renders conversations one at a time; any thread may ask. Where it cannot be had, they are rendered here.

    Args:
        tokenizer: whose template it is.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._child = 0
        if hasattr(os, "fork"):
            with suppress(OSError):  # no more processes, or no memory to promise to another
                self._fork()

    def render(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None) -> str:
        """As `templating.render`."""
        with self._lock:
            answer = self._ask(json.dumps([messages, tools]).encode())
        if answer is None:
            return render(self._tokenizer, messages, tools)
        kind, text = answer[:1], answer[1:].decode("utf-8", "surrogatepass")
        if kind == _TEXT:
            return text
        raise UsageError(text) if kind == _REFUSED else ArtefactError(text)

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._leave()

    def _fork(self) -> None:
        ours, its = socket.socketpair()
        child = os.fork()
        if child:
            its.close()
            self._socket, self._child = ours, child
            return
        try:
            # The server says when it ends: its end of the pair closes, however it died.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
            close_all_but(its.fileno())
            _answer_all(self._tokenizer, its)
        finally:
            os._exit(0)

    def _ask(self, question: bytes) -> bytes | None:
        """None where the process is not there, or no more."""
        if self._socket is None:
            return None
        try:
            self._socket.sendall(_LENGTH.pack(len(question)) + question)
            answer = _receive(self._socket)
        except OSError:
            answer = None
        if answer is None:
            self._leave()
        return answer

    def _leave(self) -> None:
        if self._socket is None:
            return
        self._socket.close()
        self._socket = None
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(self._child, signal.SIGKILL)
            os.waitpid(self._child, 0)


def _answer_all(tokenizer: Any, asked: socket.socket) -> None:
    """Render whatever is asked, until nobody is there to ask."""
    while (question := _receive(asked)) is not None:
        messages, tools = json.loads(question)
        try:
            answer = _TEXT + render(tokenizer, messages, tools).encode("utf-8", "surrogatepass")
        except UsageError as error:
            answer = _REFUSED + str(error).encode("utf-8", "replace")
        except TealError as error:
            answer = _FAILED + str(error).encode("utf-8", "replace")
        asked.sendall(_LENGTH.pack(len(answer)) + answer)


def _receive(stream: socket.socket) -> bytes | None:
    """One message; None where the stream ends."""
    head = _exactly(stream, _LENGTH.size)
    return None if head is None else _exactly(stream, _LENGTH.unpack(head)[0])


def _exactly(stream: socket.socket, size: int) -> bytes | None:
    found = bytearray()
    while len(found) < size:
        piece = stream.recv(min(_PIECE, size - len(found)))
        if not piece:
            return None
        found += piece
    return bytes(found)
