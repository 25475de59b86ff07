"""A hub on the loopback: answers as huggingface.co does to those who list and download one model."""

import hashlib
import json
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit

_COMMIT = "c0ffee" + 34 * "0"


class HubServer:
    """Serves folders as repositories, on a port of its own, for as long as the block lasts.

    Args:
        repositories: id (org/name) -> folder; "gated" or "private" in place of a folder is refused as such.
    """

    def __init__(self, repositories: dict[str, Path | str]) -> None:
        self.repositories = repositories
        self.break_after: dict[str, list[int]] = {}
        """File name -> after how many bytes each of the next downloads of it is broken off."""
        self.served: Counter[str] = Counter()
        """File name -> downloads begun."""
        self.ranges: list[str] = []
        """Range headers that were sent."""
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True

    @property
    def address(self) -> str:
        """For HF_ENDPOINT."""
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> Self:
        Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._http.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                hub._answer(self)

            def do_GET(self) -> None:
                hub._answer(self)

        return Handler

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        parts = unquote(urlsplit(request.path).path).strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        repository = "/".join(parts[2:4] if api else parts[:2])
        folder = self.repositories.get(repository)
        if folder == "gated":
            self._send(request, 403, b'{"error": "Access to this model is restricted"}', {"X-Error-Code": "GatedRepo"})
        elif not isinstance(folder, Path):  # the hub does not tell a private one from one that is not there
            status = 401 if folder == "private" else 404
            self._send(request, status, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
        elif api and "tree" in parts:
            self._send(request, 200, json.dumps([_entry(folder, file) for file in _files(folder)]).encode(), {})
        elif api:
            siblings = [{"rfilename": file} for file in _files(folder)]
            answer = {"id": repository, "sha": _COMMIT, "private": False, "gated": False, "siblings": siblings}
            self._send(request, 200, json.dumps({**answer, "downloads": 0, "likes": 0, "tags": []}).encode(), {})
        elif len(parts) > 4 and parts[2] == "resolve" and (folder / "/".join(parts[4:])).is_file():
            self._file(request, folder / "/".join(parts[4:]))
        else:
            self._send(request, 404, b"{}", {"X-Error-Code": "EntryNotFound"})

    def _file(self, request: BaseHTTPRequestHandler, file: Path) -> None:
        content, status = file.read_bytes(), 200
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": _COMMIT}
        wanted = request.headers.get("Range")
        if wanted is not None:
            self.ranges.append(wanted)
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            content, status = content[start:], 206
        if request.command == "GET":
            self.served[file.name] += 1
            breaks = self.break_after.get(file.name, [])
            if breaks:
                self._send(request, status, content, headers, most=breaks.pop(0))
                return
        self._send(request, status, content, headers)

    def _send(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        content: bytes,
        headers: dict[str, str],
        most: int | None = None,
    ) -> None:
        request.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(content[:most])
        if most is not None:  # less than was promised, and the connection ends
            request.close_connection = True


def _files(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def _entry(folder: Path, name: str) -> dict[str, Any]:
    content = (folder / name).read_bytes()
    entry: dict[str, Any] = {
        "type": "file",
        "path": name,
        "size": len(content),
        "oid": hashlib.sha1(content, usedforsecurity=False).hexdigest(),
    }
    if name.endswith(".safetensors"):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry
