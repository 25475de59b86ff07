"""`vllm serve FOLDER`, asked by OpenAI's client."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from openai import APIConnectionError, OpenAI
from vllm_models import TOKENS, environment, exported, generator, whole

PATIENCE = 600.0
MESSAGES = [{"role": "user", "content": "the quick brown fox"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("served"), "llama", "fisher")


@pytest.fixture(scope="module")
def client(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(Path(__file__).with_name("vllm_command.py")), "serve", str(model)]
    options = [
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--dtype",
        "float32",
        "--max-model-len",
        "128",
        "--enforce-eager",
    ]
    log = tmp_path_factory.mktemp("log") / "vllm.txt"
    with (
        log.open("w") as to,
        subprocess.Popen(
            [*command, *options, "--served-model-name", "tiny"], stdout=to, stderr=to, env=environment()
        ) as server,
    ):
        try:
            found = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
            _wait_for(found, server, log)
            yield found
        finally:
            server.terminate()


def _wait_for(client: OpenAI, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while True:
        assert server.poll() is None, log.read_text()[-6000:]
        assert time.monotonic() < end, log.read_text()[-6000:]
        try:
            client.models.list()
        except APIConnectionError:
            time.sleep(1)
        else:
            return


def _ask(client: OpenAI, content: str = MESSAGES[0]["content"], **options: object):
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(model="tiny", messages=messages, max_tokens=TOKENS, temperature=0, **options)


def test_a_chat_is_what_generate_writes(client: OpenAI, model: Path) -> None:
    wanted = generator(model, chat=True).reply(MESSAGES)
    found = _ask(client)
    assert whole(found.choices[0].message.content) == whole(wanted.text)
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (wanted.prompt_tokens, wanted.tokens)
    chunks = _ask(client, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == found.choices[0].message.content


def test_chats_beside_one_another_are_answered(client: OpenAI) -> None:
    with ThreadPoolExecutor(4) as threads:
        replies = list(threads.map(lambda word: _ask(client, word), ["fox", "dog", "stars", "harbour"]))
    assert all(reply.choices[0].finish_reason in ("stop", "length") for reply in replies)
    assert all(reply.choices[0].message.content for reply in replies)
