"""Clients that leave, wait, send nonsense or have no key; and a queue that is full."""

import http.client
import json
import socket
import threading
from pathlib import Path

import live_server
import openai
import pytest
from fastapi import FastAPI
from live_server import PATIENCE, Live, serving, until
from pydantic import ValidationError
from starlette.datastructures import Headers

from teal_cli.config import ServeConfig
from teal_cli.serve.guard import Guard
from teal_cli.serve.metrics import Metrics

calibrated = pytest.fixture(scope="module")(live_server.calibrated)
KEY = "a key of letters"
CONTEXT = 20_000


@pytest.fixture(scope="module")
def live(calibrated: Path):
    options = {"sparsity": [0.5], "slots": 1, "queue": 1, "context": CONTEXT, "max_new_tokens": CONTEXT - 16}
    with serving(calibrated / "tiny", calibrated / "runs", key=KEY, max_body_bytes=20_000, **options) as found:
        yield found


def _send(live: Live, method: str, path: str, body: bytes | None = None, **headers: str):
    """Status, headers and body of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=PATIENCE)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def _post(live: Live, body: object, path: str = "/v1/completions", **headers: str):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    all_headers = {"Authorization": f"Bearer {KEY}", "Content_Type": "application/json", **headers}
    status, _, answer = _send(live, "POST", path, data, **all_headers)
    return status, json.loads(answer)


def _long(live: Live, **options: object) -> dict:
    return {"model": live.name, "prompt": "fox", "max_tokens": CONTEXT - 16, "temperature": 0, **options}


def _begun(live: Live, *, stream: bool) -> socket.socket:
    """A connection on which a long reply is under way."""
    body = json.dumps(_long(live, stream=stream)).encode()
    connection = socket.create_connection(("127.0.0.1", live.port), timeout=PATIENCE)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
    connection.sendall(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    until(lambda: live.statistics().running == 1)
    return connection


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "body"])
def test_a_client_that_leaves_frees_its_slot(live: Live, stream: bool) -> None:
    before = live.statistics()
    connection = _begun(live, stream=stream)
    until(lambda: live.statistics().completion_tokens > before.completion_tokens + 3)
    connection.close()
    live.wait_until_idle()
    after = live.statistics()
    assert after.finished["cancelled"] == before.finished.get("cancelled", 0) + 1
    assert after.completion_tokens - before.completion_tokens < CONTEXT - 16


def test_past_the_queue_clients_are_told_to_come_back(live: Live) -> None:
    running = _begun(live, stream=True)
    waiting = threading.Thread(target=lambda: _post(live, _long(live, max_tokens=2)))
    waiting.start()
    until(lambda: live.statistics().queued == 1)
    body = json.dumps(_long(live)).encode()
    headers = {"Authorization": f"Bearer {KEY}", "Content_Type": "application/json"}
    status, said, answer = _send(live, "POST", "/v1/completions", body, **headers)
    assert status == 429
    assert int(said["retry-after"]) >= 1
    assert json.loads(answer)["error"]["code"] == "queue_full"
    # Of several replies all are taken or none.
    assert _post(live, _long(live, n=2))[0] == 429
    assert live.statistics().queued == 1
    with live.client(KEY) as client, pytest.raises(openai.RateLimitError):
        client.completions.create(**_long(live))
    running.close()
    waiting.join(PATIENCE)
    live.wait_until_idle()


def test_a_key_is_asked_for_where_answers_are(live: Live) -> None:
    for path in ("/v1/models", "/metrics", "/v1/chat/completions", "/nowhere"):
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}):
            status, headers, answer = _send(live, "GET", path, **given)
            assert status == 401
            assert headers["www-authenticate"] == "Bearer"
            assert json.loads(answer)["error"]["code"] == "invalid_api_key"
    for path in ("/", "/page.js", "/page.css", "/health"):
        assert _send(live, "GET", path)[0] == 200
    with live.client(KEY) as client:
        assert client.models.list().data[0].id == "tiny"
    with live.client("wrong") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"Host": "evil.example"}, 403, "host_not_allowed"),
        ({"Host": "localhost.evil.example:80"}, 403, "host_not_allowed"),
        ({"Host": ""}, 403, "host_not_allowed"),
        ({"Origin": "https://evil.example"}, 403, "origin_not_allowed"),
        ({"Origin": "null"}, 403, "origin_not_allowed"),
        ({"Content_Type": "text/plain"}, 415, "content_type"),
        ({"Content_Type": "application/x-www-form-urlencoded"}, 415, "content_type"),
    ],
)
def test_pages_of_other_sites_are_not_answered(live: Live, headers: dict, status: int, code: str) -> None:
    found = _post(live, _long(live, max_tokens=1), **headers)
    assert (found[0], found[1]["error"]["code"]) == (status, code)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:1", "[::1]:8000", "192.168.0.7"])
def test_addresses_of_this_machine_are_answered(live: Live, host: str) -> None:
    assert _post(live, _long(live, max_tokens=1), Host=host, Origin=f"http://{host}")[0] == 200


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"\xff\xfe", 400),
        (b"[" * 9_000, 400),
        (b"null", 400),
        (b'{"model": "tiny", "prompt": "\\ud800"}', 400),
        (b'{"model": "tiny", "prompt": NaN}', 400),
        (b'{"model": "tiny", "prompt": [' + b"9" * 5_000 + b"]}", 400),
        (b'{"model": "tiny", "prompt": [511, 99999]}', 400),
        (b'{"model": "tiny", "prompt": []}', 400),
        (b'{"model": "tiny", "prompt": ""}', 400),
        (b'{"model": "tiny", "prompt": "' + b"x" * 20_000 + b'"}', 413),
    ],
    ids=range(12),
)
def test_nonsense_is_refused_with_a_reason(live: Live, body: bytes, status: int) -> None:
    found, answer = _post(live, body)
    assert found == status
    assert answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"


def test_other_paths_and_methods_have_the_same_form(live: Live) -> None:
    for method, path, status in (("GET", "/v2", 404), ("GET", "/v1/completions", 405), ("DELETE", "/", 405)):
        found, headers, answer = _send(live, method, path, Authorization=f"Bearer {KEY}")
        assert found == status
        assert json.loads(answer)["error"]["message"]
        assert headers["x-content-type-options"] == "nosniff"


def test_a_defect_of_ours_is_an_answer_like_others(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live.service, "created", object())  # is no JSON
    status, headers, answer = _send(live, "GET", "/v1/models", Authorization=f"Bearer {KEY}")
    assert status == 500
    assert headers["x-content-type-options"] == "nosniff"
    assert json.loads(answer)["error"]["type"] == "server_error"
    text = _send(live, "GET", "/metrics", Authorization=f"Bearer {KEY}")[2].decode()
    assert 'teal_http_requests_total{path="/v1/models",status="500"} 1.0' in text


def test_a_key_may_have_any_letters() -> None:
    guard = Guard(FastAPI(), hosts=[], key="schlüssel", metrics=Metrics(lambda: None))
    headers = Headers(raw=[(b"host", b"localhost"), (b"authorization", "Bearer schlüssel".encode())])
    assert guard._refusal("/v1/models", headers) is None


@pytest.mark.parametrize("host", ["example.com:8443", "https://example.com", "[::1]"])
def test_allowed_hosts_are_names(host: str) -> None:
    with pytest.raises(ValidationError, match="is no name"):
        ServeConfig(model="m", allowed_hosts=f"localhost,{host}")


@pytest.mark.parametrize("stream", [False, True], ids=["body", "stream"])
def test_replies_that_the_end_cuts_are_told_so(calibrated: Path, stream: bool) -> None:
    options = {"sparsity": [0.5], "slots": 1, "context": CONTEXT, "max_new_tokens": CONTEXT - 16, "drain_seconds": 0}
    answers: list[tuple[int, bytes]] = []
    with serving(calibrated / "tiny", calibrated / "runs", **options) as live:
        body = json.dumps(_long(live, stream=stream)).encode()

        def ask() -> None:
            status, _, answer = _send(live, "POST", "/v1/completions", body, Content_Type="application/json")
            answers.append((status, answer))

        asking = threading.Thread(target=ask)
        asking.start()
        until(lambda: live.statistics().completion_tokens > 3)
        live.server.should_exit = True
        asking.join(PATIENCE)
    ((status, answer),) = answers
    assert status == (200 if stream else 503)
    last = answer.strip().splitlines()[-1].removeprefix(b"data: ")
    assert json.loads(last)["error"]["code"] == "stopping"


def test_metrics_say_what_happened(live: Live) -> None:
    assert _post(live, _long(live, max_tokens=5))[0] == 200
    text = _send(live, "GET", "/metrics", Authorization=f"Bearer {KEY}")[2].decode()
    values = {name: float(value) for name, value in (x.rsplit(" ", 1) for x in text.splitlines() if x[0] != "#")}
    assert values['teal_http_requests_total{path="/v1/completions",status="200"}'] >= 1
    assert values["teal_completion_tokens_total"] == live.statistics().completion_tokens >= 5
    assert values["teal_time_to_first_token_seconds_count"] >= 1
    assert values["teal_time_per_token_seconds_count"] >= 1
    assert 0.3 < values["teal_realised_sparsity"] < 0.7
    assert values["teal_requests_running"] == values["teal_requests_queued"] == 0
    assert values["teal_slots"] == 1
    assert values["teal_cache_positions"] == CONTEXT


def test_the_page_needs_nothing_else(live: Live) -> None:
    status, headers, page = _send(live, "GET", "/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    script, style = (_send(live, "GET", f"/page.{kind}")[2].decode() for kind in ("js", "css"))
    for text in (page.decode(), script, style):
        assert "://" not in text
        assert "innerHTML" not in text
    assert "style=" not in page.decode()
    assert " on" not in page.decode().replace(" one", "")  # no handlers in markup
