"""`teal serve` on two GPUs, against one."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from command_line import calibrate_once
from serving_ranks import ASKED, PEER_SECONDS, RanksServer, texts_at_once

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than 2 GPUs")
DENSE = [{**body, "temperature": 0, "sparsity": 0} for body in ASKED]
"""A sparse text may part from that of one GPU where an input lies beside its threshold."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrate_once(tmp_path_factory.mktemp("home"), chat=True)


def test_texts_are_those_of_one_gpu(home: Path) -> None:
    servers = [RanksServer(home, "--device", "cuda", count=count) for count in (1, 2)]
    try:
        one, two = (texts_at_once(server, DENSE) for server in servers)
        assert two == one
        texts_at_once(servers[1], ASKED)
        sparse = texts_at_once(servers[1], ASKED[:1])
        before = servers[1].seconds()
        time.sleep(1.5 * PEER_SECONDS)
        assert servers[1].seconds() - before < 0.3 * PEER_SECONDS
        assert texts_at_once(servers[1], ASKED[:1]) == sparse
        assert servers[1].end(signal.SIGTERM) == (0, [])
        assert servers[1].gone()
    finally:
        for server in servers:
            server.kill()


def test_a_rank_that_dies_ends_all(home: Path) -> None:
    server = RanksServer(home, "--device", "cuda")
    try:
        os.kill(server.pids[1], signal.SIGKILL)
        killed = time.monotonic()
        assert server.ended() == (4, ["teal: rank 1 died of SIGKILL: all ranks have been ended"])
        assert time.monotonic() - killed < 20
        assert server.gone()
    finally:
        server.kill()
