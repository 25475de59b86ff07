"""Fifty conversations at once: each has the text that it has alone."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import live_server
import pytest
from live_server import Live

from teal_cli.config import GenerateConfig
from teal_cli.console import QUIET
from teal_cli.steps.generate import Generator

calibrated = pytest.fixture(scope="module")(live_server.calibrated)
live = pytest.fixture(scope="module")(live_server.live)

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "wise", "men", "stars"]
CONVERSATIONS = 50
TURNS = 2


def _question(number: int, turn: int) -> str:
    start = (7 * number + 3 * turn) % len(WORDS)
    return f"{number} {' '.join((WORDS + WORDS)[start : start + 2 + number % 5])}"


def _tokens(number: int) -> int:
    return 6 + number % 13


def test_fifty_conversations_at_once(live: Live, calibrated: Path) -> None:
    config = GenerateConfig(
        model=str(calibrated / "tiny"), runs=calibrated / "runs", dtype="float32", device="cpu", sparsity=0.5
    )
    generator = Generator(config, QUIET)
    wanted = []
    for number in range(CONVERSATIONS):
        one = config.model_copy(update={"max_new_tokens": _tokens(number)})
        messages: list[dict[str, str]] = []
        for turn in range(TURNS):
            messages.append({"role": "user", "content": _question(number, turn)})
            messages.append({"role": "assistant", "content": generator.reply(messages, config=one).text})
        wanted.append([message["content"] for message in messages[1::2]])

    client = live.client()

    def converse(number: int) -> list[str]:
        messages: list[dict[str, str]] = []
        for turn in range(TURNS):
            messages.append({"role": "user", "content": _question(number, turn)})
            asked = {"model": live.name, "messages": messages, "max_tokens": _tokens(number), "temperature": 0}
            if number % 2:
                chunks = client.chat.completions.create(stream=True, **asked)
                text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
            else:
                text = client.chat.completions.create(**asked).choices[0].message.content
            messages.append({"role": "assistant", "content": text})
        return [message["content"] for message in messages[1::2]]

    before = live.statistics().finished.get("length", 0)
    with client, ThreadPoolExecutor(CONVERSATIONS) as pool:
        found = list(pool.map(converse, range(CONVERSATIONS)))
    assert found == wanted
    assert len({tuple(texts) for texts in found}) == CONVERSATIONS
    live.wait_until_idle()
    ended = live.statistics().finished
    assert ended["length"] + ended.get("stop", 0) - before == CONVERSATIONS * TURNS
    assert not {"error", "cancelled", "time"} & set(ended)
