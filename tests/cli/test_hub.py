"""Models of a hub, from nothing to text: a server on the loopback answers as the hub does."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import build_model, build_tokenizer
from hub_server import HubServer

from teal_cli.cli import run

_GENERATE = ("--sparsity", "0", "--prompt", "the quick brown", "--max-new-tokens", "8", "--device", "cpu")
_SEVERAL = """
import json, sys
from huggingface_hub import constants
from teal_cli.cli import run
constants.DOWNLOAD_CHUNK_SIZE = 500  # what it writes at a time, and so what a broken download leaves
for line in sys.stdin:
    print(run(json.loads(line)), flush=True)
"""


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A tiny model in shards, as it lies on the hub, with files that nobody should download."""
    folder = tmp_path / "published"
    build_model("llama").save_pretrained(folder, max_shard_size="100KB")
    build_tokenizer().save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.safetensors").write_bytes(b"twice")
    assert len(list(folder.glob("model-*.safetensors"))) >= 3
    return folder


@contextmanager
def _teal(hub: HubServer, home: Path) -> Iterator[Callable[..., tuple[list[int], str]]]:
    """A new process, which runs command lines one after another: their exit codes, and all that it said on stderr."""
    own = {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_TOKEN": ""}
    environment = {**os.environ, **own, "PYTHONPATH": os.pathsep.join(sys.path)}
    with Path("said.txt").open("w") as said:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": said, "text": True}
        process = subprocess.Popen([sys.executable, "-c", _SEVERAL], env=environment, **pipes)

    def run_all(*commands: list[str]) -> tuple[list[int], str]:
        print(*map(json.dumps, commands), sep="\n", file=process.stdin, flush=True)
        codes: list[int] = []
        while len(codes) < len(commands) and (line := process.stdout.readline()):
            codes += [int(line)] if line.strip().isdigit() else []
        return codes, Path("said.txt").read_text()

    try:
        yield run_all
        process.stdin.close()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_from_nothing_to_text_through_a_broken_connection(published: Path, tmp_path: Path) -> None:
    """A shard that breaks off in the middle goes on from there; afterwards the model needs no hub."""
    assert run(["generate", "--model", str(published), *_GENERATE, "--json", "local.json"]) == 0
    shard = min(published.glob("model-*.safetensors"))
    command = ["generate", "--model", "org/tiny", *_GENERATE]
    with HubServer({"org/tiny": published}) as hub:
        hub.break_after[shard.name] = [1000]
        with _teal(hub, tmp_path / "hub") as teal:
            codes, errors = teal([*command, "--json", "first.json"])
        assert codes == [0], errors
        assert hub.ranges == ["bytes=1000-"]
        assert "pytorch_model.bin" not in hub.served
        assert "consolidated.safetensors" not in hub.served
    with _teal(hub, tmp_path / "hub") as teal:  # the hub is gone
        codes, errors = teal([*command, "--json", "again.json"])
    assert codes == [0], errors
    texts = [json.loads(Path(name).read_text())["text"] for name in ("local.json", "first.json", "again.json")]
    assert texts[0] == texts[1] == texts[2]
    assert json.loads(Path("first.json").read_text())["model"] == "org--tiny"


def test_what_the_hub_refuses(published: Path, tmp_path: Path) -> None:
    """Gated, private, missing, no transformers model, pickled weights only, given up halfway: exit 3 and one line."""
    bare, pickled = tmp_path / "bare", tmp_path / "pickled"
    for folder in (bare, pickled):
        folder.mkdir()
    (bare / "README.md").write_text("nothing here")
    (pickled / "config.json").write_bytes((published / "config.json").read_bytes())
    (pickled / "pytorch_model.bin").write_bytes(b"pickled")
    shards = sorted(published.glob("model-*.safetensors"))
    repositories = {"org/gated": "gated", "org/private": "private", "org/bare": bare, "org/pickled": pickled}
    with HubServer({**repositories, "org/tiny": published}) as hub, _teal(hub, tmp_path / "hub") as teal:
        hub.break_after[shards[-1].name] = [0] * 9  # again and again, until the library gives up
        names = ["org/gated", "org/private", "org/none", "org/bare", "org/pickled", "org/tiny"]
        commands = [["generate", "--model", name, *_GENERATE] for name in names]
        codes, errors = teal(*commands)
        assert codes == [3] * 6, errors
        lines = [line for line in errors.splitlines() if line.startswith("teal: ")]
        wanted = ("is gated: accept its licence", "or it is private", "has no model 'org/none'", "has no config.json")
        for line, text in zip(lines, (*wanted, "loads no pickled ones", "broke off"), strict=True):
            assert text in line
        assert "Traceback" not in errors
        whole = {shard.name: hub.served[shard.name] for shard in shards[:-1]}
        hub.break_after.clear()
        codes, errors = teal(commands[-1])
        assert codes == [0], errors
        assert {name: hub.served[name] for name in whole} == whole  # what had come whole is not fetched again
