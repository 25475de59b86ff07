"""`teal serve --tensor-parallel 2`: texts are those of one process, and all ranks end together, whatever ends them."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import live_server
import pytest
from command_line import fails
from live_server import PATIENCE, until
from serving_ranks import ASKED, PEER_SECONDS, RanksServer, texts_at_once

calibrated = pytest.fixture(scope="module")(live_server.calibrated)
FLAGS = ("--device", "cpu", "--backend", "reference")


@pytest.fixture
def ranks(calibrated: Path) -> Iterator[RanksServer]:
    """A server that is ready, whose processes are forked; the test ends it."""
    server = RanksServer(calibrated, *FLAGS, forked=True)
    yield server
    server.kill()


@pytest.fixture
def started(calibrated: Path) -> Iterator[RanksServer]:
    """The same, started as users start it."""
    server = RanksServer(calibrated, *FLAGS)
    yield server
    server.kill()


def test_texts_are_those_of_one_process(started: RanksServer, calibrated: Path) -> None:
    ranks, alone = started, RanksServer(calibrated, *FLAGS, count=1, forked=True)
    expected = texts_at_once(alone, ASKED)
    alone.kill()
    assert texts_at_once(ranks, ASKED) == expected

    # Longer than ranks wait for one another: they are told that there is nothing to do, and sleep meanwhile.
    before = ranks.seconds()
    time.sleep(1.5 * PEER_SECONDS)
    assert ranks.seconds() - before < 0.2 * PEER_SECONDS
    assert texts_at_once(ranks, ASKED) == expected

    # The first signal lets a reply under way come to its end, also where all processes get it, as systemd sends it.
    answers: list[dict[str, Any]] = []
    long = {"prompt": "fox", "max_tokens": 150, "temperature": 0}
    asking = threading.Thread(target=lambda: answers.append(ranks.ask(long)))
    asking.start()
    until(lambda: b"teal_requests_running 1.0" in ranks.metrics())
    for pid in ranks.pids:
        os.kill(pid, signal.SIGTERM)
    assert ranks.end(signal.SIGTERM) == (0, [])
    assert "sums over ranks by Gloo" in ranks.said
    asking.join(PATIENCE)
    assert answers[0]["status"] == 200
    assert answers[0]["usage"]["completion_tokens"] == 150
    until(ranks.gone)


def test_a_rank_that_dies_ends_all_and_clients_are_told(ranks: RanksServer) -> None:
    heard: list[bytes] = []
    asking = threading.Thread(target=ranks.stream, args=({"prompt": "fox", "max_tokens": 800}, heard))
    asking.start()
    until(lambda: len(heard) > 4)
    os.kill(ranks.pids[1], signal.SIGKILL)
    killed = time.monotonic()
    assert ranks.ended() == (4, ["teal: rank 1 died of SIGKILL: all ranks have been ended"])
    assert time.monotonic() - killed < 20
    asking.join(PATIENCE)
    error = next(json.loads(line.removeprefix(b"data: ")) for line in heard if b'"error"' in line)
    assert "another process of --tensor-parallel has ended" in error["error"]["message"]
    until(ranks.gone)


def test_the_first_rank_that_dies_ends_all(ranks: RanksServer) -> None:
    os.kill(ranks.pids[0], signal.SIGKILL)
    assert ranks.ended() == (4, ["teal: rank 0 died of SIGKILL: all ranks have been ended"])
    until(ranks.gone)


@pytest.fixture
def refused(calibrated: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    def check(code: int, said: str, *flags: object) -> None:
        fails(capsys, code, said, "serve", "--model", calibrated / "tiny", "--tensor-parallel", 2, *flags)
        assert not Path("runs").exists()

    return check


def test_what_is_wrong_is_said_before_anything_is_made(refused: Callable[..., None]) -> None:
    refused(2, "is no address of this machine", "--host", "a..b", "--port", 0)
    refused(2, "no key in NO_KEY", "--api-key-env", "NO_KEY", "--port", 0)
