"""A server in this process, on a tiny model, for tests."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from command_line import calibrate_on
from conftest import save_tiny, write_corpus
from safetensors.torch import load_file, save_file

for package in ("fastapi", "uvicorn", "prometheus_client", "openai"):
    pytest.importorskip(package, reason=f"{package} is not installed (the extras serve and dev have it)")

from openai import OpenAI  # noqa: E402

from teal_cli.config import ServeConfig  # noqa: E402
from teal_cli.console import QUIET  # noqa: E402
from teal_cli.models.tokenizing import load_tokenizer  # noqa: E402
from teal_cli.serve.server import Server, bind, make_server, run  # noqa: E402
from teal_cli.serve.service import Service  # noqa: E402
from teal_cli.steps.serve import load  # noqa: E402

PATIENCE = 60.0
"""Seconds by the clock after which a test gives up: machines stand still now and then."""


@dataclass
class Live:
    """A server that answers."""

    port: int
    service: Service
    server: Server

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, key: str = "none", retries: int = 0) -> OpenAI:
        return OpenAI(base_url=f"{self.address}/v1", api_key=key, max_retries=retries, timeout=PATIENCE)

    @property
    def name(self) -> str:
        return self.service.served.name

    def statistics(self):
        return self.service.served.scheduler.statistics()

    def wait_until_idle(self) -> None:
        until(lambda: (self.statistics().running, self.statistics().queued) == (0, 0))


def until(condition) -> None:
    """Wait for something that must come."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


@contextmanager
def serving(model: Path, runs: Path, *, key: str | None = None, **options: object) -> Iterator[Live]:
    """A server on a free port, ready to answer."""
    config = ServeConfig(model=str(model), runs=runs, dtype="float32", device="cpu", port=0, **options)
    listening = bind(config.host, 0)
    failed: list[BaseException] = []
    service = Service(config, lambda: load(config, QUIET), on_failure=lambda: None)
    server = make_server(service, key)

    def work() -> None:
        try:
            run(server, service, listening)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        until(lambda: service.is_ready or service.failure or failed)
        assert service.failure is None, service.failure
        yield Live(listening.getsockname()[1], service, server)
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert not failed, failed


def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fixture: HOME/tiny, and HOME/runs/tiny with its calibration, to which servers add exports.

    The model has positions for replies that take longer than a test, and no greedy reply of it ends by itself.
    """
    home = tmp_path_factory.mktemp("served")
    folder = save_tiny(home / "tiny", chat=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1 << 17}))
    weights = load_file(folder / "model.safetensors")
    ends = {config["eos_token_id"], load_tokenizer(folder).eos_token_id}
    weights["lm_head.weight"][sorted(ends)] = 0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    calibrate_on(write_corpus(home / "corpus.txt"), home / "tiny", home / "runs")
    return home


def live(calibrated: Path) -> Iterator[Live]:
    """A fixture: a server with two levels of sparsity."""
    options = {"sparsity": [0.5, 0.3], "slots": 8, "queue": 64, "context": 256, "max_new_tokens": 200}
    with serving(calibrated / "tiny", calibrated / "runs", **options) as found:
        yield found


def client(live: Live) -> Iterator[OpenAI]:
    """A fixture."""
    with live.client() as found:
        yield found
