"""`teal serve` as a process: it loads, answers, drains at SIGTERM, and starts again after kill -9."""

import http.client
import json
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import live_server
import pytest
import uvicorn
from command_line import fails
from live_server import PATIENCE, until
from warm import COMMAND, environment, warm

from teal_cli.serve.server import Server

calibrated = pytest.fixture(scope="module")(live_server.calibrated)


def _get(port: int, path: str) -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class _Server:
    def __init__(self, calibrated: Path, port: int, *flags: str, forked: bool) -> None:
        self.port, self.told = port, Path(f"told-{port}-{len(flags)}.json").absolute()
        self.told.unlink(missing_ok=True)
        where = ["--runs", calibrated / "runs", "--json", self.told, "--port", port]
        words = [*map(str, ["serve", "--model", calibrated / "tiny", "--device", "cpu", *where]), *flags]
        options = {"env": environment(), "stderr": subprocess.PIPE, "text": True}
        self.process = warm().start(words, **options) if forked else subprocess.Popen([*COMMAND, *words], **options)

    def health(self) -> int | None:
        assert self.process.poll() is None, self.process.stderr.read()
        try:
            return _get(self.port, "/health")[0]
        except ConnectionError:
            return None

    def end(self, number: int) -> tuple[int, str]:
        self.process.send_signal(number)
        said = self.process.communicate(timeout=PATIENCE)[1]
        return self.process.returncode, said


@pytest.fixture
def start(calibrated: Path) -> Iterator[Callable[[int], _Server]]:
    """Starts servers, of which none outlives the test: the first as users do, others forked."""
    started: list[_Server] = []

    def start(port: int) -> _Server:
        started.append(_Server(calibrated, port, "--drain-seconds", "60", forked=bool(started)))
        return started[-1]

    yield start
    for server in started:
        server.process.kill()
        server.process.wait()


def test_it_loads_answers_drains_and_starts_again(start: Callable[[int], _Server]) -> None:
    server = start(_free_port())
    until(lambda: server.health() is not None)
    if server.health() == 503:  # or it was loaded while nobody looked
        assert _get(server.port, "/v1/models")[1]["error"]["code"] == "not_ready"
    until(lambda: server.health() == 200)
    until(server.told.exists)
    told = json.loads(server.told.read_text())
    assert told["address"] == f"http://127.0.0.1:{server.port}"
    assert told["pid"] == server.process.pid
    assert told["sparsity"] == [0.0, 0.5]

    # kill -9 leaves nothing behind: the port and the templates' process go with it.
    assert server.end(signal.SIGKILL)[0] == -signal.SIGKILL
    server = start(server.port)
    until(lambda: server.health() == 200)

    answers: list[tuple[int, dict]] = []

    def ask() -> None:
        body = json.dumps({"model": "tiny", "prompt": "fox", "max_tokens": 400, "temperature": 0}).encode()
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answers.append((answer.status, json.loads(answer.read())))

    asking = threading.Thread(target=ask)
    asking.start()
    until(lambda: b"teal_requests_running 1.0" in _text(server.port))
    code, said = server.end(signal.SIGTERM)
    asking.join(PATIENCE)
    assert code == 0, said
    assert answers[0][0] == 200
    assert answers[0][1]["usage"]["completion_tokens"] == 400
    assert "Traceback" not in said


def _text(port: int) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request("GET", "/metrics")
        return connection.getresponse().read()
    finally:
        connection.close()


def test_what_is_wrong_is_said_before_anything_is_loaded(
    calibrated: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ("serve", "--model", calibrated / "tiny")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        fails(capsys, 4, "cannot be listened at", *model, "--port", taken.getsockname()[1])
    fails(capsys, 2, "is no address of this machine", *model, "--host", "a..b", "--port", 0)
    monkeypatch.delenv("NO_KEY", raising=False)
    fails(capsys, 2, "no key in NO_KEY", *model, "--api-key-env", "NO_KEY")
    fails(capsys, 2, "slots (flag --slots)", *model, "--slots", 9)
    fails(capsys, 2, "has room for", *model, "--context", 20, "--max-new-tokens", 20)


def test_a_model_that_cannot_be_loaded_ends_the_server(
    calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    fails(capsys, 3, "nowhere", "serve", "--model", tmp_path / "nowhere", "--port", 0)
    exported = calibrated / "runs" / "tiny" / "fisher-0.50"
    if exported.exists():
        fails(capsys, 2, "was exported at sparsity 0.5", "serve", "--model", exported, "--sparsity", 0.3, "--port", 0)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("launched", [False, True])
def test_a_second_signal_is_the_launcher_s_where_ranks_serve(launched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who tells all processes to end tells the first rank, and so does its launcher; also when it ends already."""
    monkeypatch.delenv("TEAL_LAUNCHER", raising=False)
    if launched:
        monkeypatch.setenv("TEAL_LAUNCHER", "1")
    server, before = Server(uvicorn.Config("none"), None), signal.getsignal(signal.SIGTERM)  # type: ignore[arg-type]
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        with server.capture_signals():
            signal.raise_signal(signal.SIGTERM)
            assert (server.should_exit, server.force_exit) == (True, False)
            signal.raise_signal(signal.SIGTERM)
            assert server.force_exit != launched
        assert signal.getsignal(signal.SIGTERM) == (signal.SIG_IGN if launched else before)
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, interrupt)
