"""`teal serve` as processes of their own that share a tiny model, for tests: started, asked and ended."""

import http.client
import json
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from warm import COMMAND, environment, warm

PATIENCE = 60.0
"""Seconds by the clock after which a test gives up: machines stand still now and then."""
PEER_SECONDS = 8
ASKED: list[dict[str, Any]] = [
    {"prompt": "the quick", "max_tokens": 12, "temperature": 0},
    {"prompt": "fox and the lighthouse", "max_tokens": 20, "temperature": 0.8, "seed": 3},
    {"prompt": "the quick brown fox jumps over the lazy dog while seven wise men", "max_tokens": 9, "temperature": 0},
    {"prompt": "a small blue book", "max_tokens": 16, "temperature": 0, "sparsity": 0},
]


class RanksServer:
    """A server that is ready.

    Args:
        home: with the model `tiny`, and `runs` with its calibration.
        flags: of the command.
        count: of ranks; 1 is one process.
        forked: its processes are, from one that has imported everything.
    """

    def __init__(self, home: Path, *flags: str, count: int = 2, forked: bool = False) -> None:
        told = Path(f"told-{count}.json").absolute()
        where = ["--model", home / "tiny", "--runs", home / "runs", "--json", told, "--port", 0]
        of_ranks = ["--tensor-parallel", count, "--peer-timeout", PEER_SECONDS]
        words = list(map(str, ["serve", *where, "--dtype", "float32", *of_ranks, *flags]))
        options = {"env": environment(), "stderr": subprocess.PIPE, "text": True}
        self.process = warm().start(words, **options) if forked else subprocess.Popen([*COMMAND, *words], **options)
        began = time.monotonic()  # several processes import torch
        while not told.exists() and self.process.poll() is None and time.monotonic() < began + 3 * PATIENCE:
            time.sleep(0.05)
        if not told.exists():
            self.process.kill()
            pytest.fail(f"it does not serve: {self.process.communicate()[1]}")
        self.port = int(json.loads(told.read_text())["address"].rpartition(":")[2])
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        self.pids = list(map(int, children)) if count > 1 else []
        """Of the ranks, in the order in which they were started."""
        assert len(self.pids) in (0, count)
        self.said = ""
        """On stderr, until the end."""

    def gone(self) -> bool:
        """Whether no rank runs."""
        return not any(map(_runs, self.pids))

    def end(self, number: int) -> tuple[int, list[str]]:
        """A signal to the command; as `ended`."""
        self.process.send_signal(number)
        return self.ended()

    def ended(self) -> tuple[int, list[str]]:
        """Wait for the end: its exit code, and lines that are errors."""
        self.said = self.process.communicate(timeout=PATIENCE)[1]
        assert "Traceback" not in self.said
        return self.process.returncode, [line for line in self.said.splitlines() if line.startswith("teal: ")]

    def kill(self) -> None:
        """End what a test left."""
        self.process.kill()
        self.process.wait()
        end = time.monotonic() + PATIENCE
        while not self.gone():
            assert time.monotonic() < end, "a rank outlives its launcher"
            time.sleep(0.05)

    def seconds(self) -> float:
        """That the ranks have computed."""
        return sum(map(_seconds, self.pids))

    def ask(self, body: dict[str, Any]) -> dict[str, Any]:
        """A completion, and its status."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        sent = json.dumps({"model": "tiny", **body}).encode()
        connection.request("POST", "/v1/completions", sent, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return {"status": answer.status, **json.loads(answer.read())}

    def stream(self, body: dict[str, Any], heard: list[bytes]) -> None:
        """The same, line by line as it comes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        sent = json.dumps({"model": "tiny", "stream": True, **body}).encode()
        connection.request("POST", "/v1/completions", sent, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        while line := answer.readline():
            heard.append(line)

    def metrics(self) -> bytes:
        """What Prometheus is told."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        connection.request("GET", "/metrics")
        return connection.getresponse().read()


def texts_at_once(server: RanksServer, asked: list[dict[str, Any]]) -> list[tuple[str, int]]:
    """What is answered to all that is asked, at the same time: texts, and lengths."""
    answers: list[dict[str, Any]] = [{} for _ in asked]

    def work(nth: int) -> None:
        answers[nth] = server.ask(asked[nth])

    threads = [threading.Thread(target=work, args=(nth,)) for nth in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert [answer["status"] for answer in answers] == [200] * len(asked)
    return [(answer["choices"][0]["text"], answer["usage"]["completion_tokens"]) for answer in answers]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
