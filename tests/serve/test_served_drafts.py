"""`teal serve --speculate`: every answer is that of a server without it, whoever else is answered beside it."""

import http.client
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import live_server
import openai
import pytest
from command_line import fails
from conftest import save_tiny
from live_server import PATIENCE, Live, serving
from pydantic import ValidationError

from teal_cli.config import ServeConfig

calibrated = pytest.fixture(scope="module")(live_server.calibrated)

OPTIONS = {"slots": 8, "queue": 64, "context": 400, "max_new_tokens": 300}
OPTIONS_OF_STREAMS = {"include_usage": True, "continuous_usage_stats": True}
SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "wise", "men", "stars"]
CONVERSATIONS = 24
KINDS = {
    "lookup+int8": {"draft_tokens": 3},
    "sparse": {"sparsity": [0.5, 0.3]},  # as many as pay
    "int8+sparse": {"sparsity": [0.5, 0.3], "draft_tokens": 2},
}


def asked(number: int) -> dict:
    """A request of some kind: greedy or drawn, with or without stop strings, probabilities and a schema."""
    start = (5 * number) % len(WORDS)
    words = " ".join((WORDS + WORDS)[start : start + 3 + number % 4])
    kinds = [
        {"temperature": 0},
        {"temperature": 0.8, "seed": number},
        {"temperature": 0, "logprobs": True, "top_logprobs": 2},
        {"temperature": 0.7, "top_p": 0.9, "seed": number, "n": 2},
        {"temperature": 0, "stop": ["e", "\n"]},
        {"temperature": 0.9, "seed": 1, "logprobs": True},
    ]
    messages = [{"role": "user", "content": f"{number} {words} {words}"}]
    return {"messages": messages, "max_tokens": 20 + 3 * (number % 11), **kinds[number % len(kinds)]}


def answer(live: Live, request: dict) -> list[tuple]:
    """Of each reply: text, how it ended, and probabilities."""
    with live.client() as client:
        found = client.chat.completions.create(model=live.name, **request)
    return [
        (
            choice.message.content,
            choice.finish_reason,
            [(one.token, pytest.approx(one.logprob, abs=1e-4)) for one in choice.logprobs.content]
            if choice.logprobs
            else None,
        )
        for choice in found.choices
    ] + [(found.usage.prompt_tokens, found.usage.completion_tokens)]


def streamed(live: Live, request: dict) -> tuple[str, dict]:
    """The text, and the usage."""
    with live.client() as client:
        chunks = list(
            client.chat.completions.create(model=live.name, stream=True, stream_options=OPTIONS_OF_STREAMS, **request)
        )
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-2] == counts[-1]
    assert len({chunk.usage.prompt_tokens for chunk in chunks}) == 1  # known from the first one on
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    return text, chunks[-1].usage.model_dump()


def metric(live: Live, name: str) -> float:
    with closing(http.client.HTTPConnection("127.0.0.1", live.port, timeout=PATIENCE)) as connection:
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(f"{name} ")))


def chooses(live: Live) -> bool:
    """Whether the number of drafted tokens follows what pays, which no test knows."""
    return live.service.config.draft_tokens is None


@pytest.fixture(scope="module")
def plain(calibrated: Path) -> Iterator[Live]:
    with serving(calibrated / "tiny", calibrated / "runs", sparsity=[0.0, 0.5, 0.3], **OPTIONS) as found:
        yield found


@pytest.fixture(scope="module", params=KINDS)
def live(request: pytest.FixtureRequest, calibrated: Path) -> Iterator[Live]:
    how = {"speculate": request.param, **KINDS[request.param]}
    with serving(calibrated / "tiny", calibrated / "runs", **how, **OPTIONS) as found:
        yield found


@pytest.fixture(scope="module")
def wanted(plain: Live) -> list[list[tuple]]:
    """One after the other."""
    return [answer(plain, asked(number)) for number in range(CONVERSATIONS)]


def test_many_conversations_at_once(live: Live, wanted: list[list[tuple]]) -> None:
    with ThreadPoolExecutor(CONVERSATIONS) as pool:
        found = list(pool.map(lambda number: answer(live, asked(number)), range(CONVERSATIONS)))
    assert found == wanted
    live.wait_until_idle()
    statistics = live.statistics()
    assert not {"error", "cancelled", "time"} & set(statistics.finished)
    assert statistics.drafted_tokens is not None


def test_one_at_a_time(live: Live, wanted: list[list[tuple]]) -> None:
    """Where most is drafted. A seed gives the same text again, as it did beside others."""
    before = live.statistics()
    assert [answer(live, asked(number)) for number in range(12)] == wanted[:12]
    after = live.statistics()
    assert after.drafted_tokens > before.drafted_tokens
    assert after.accepted_tokens > before.accepted_tokens or chooses(live)


def test_several_tokens_at_once_are_streamed_and_counted(live: Live, plain: Live) -> None:
    request = {"messages": [{"role": "user", "content": "fox fox fox"}], "max_tokens": 200, "temperature": 0}
    before = [metric(live, f"teal_{name}_tokens_total") for name in ("drafted", "accepted", "completion")]
    passes = metric(live, "teal_passes_total")
    text, usage = streamed(live, request)
    expected, of_plain = streamed(plain, request)
    assert text == expected
    assert usage["completion_tokens"] == of_plain["completion_tokens"] == 200
    assert of_plain["teal"]["accepted_tokens"] == 0
    assert usage["teal"]["sparsity"] == 0
    assert usage["teal"]["realised_sparsity"] is None
    assert usage["teal"]["tokens_per_second"] > 0
    live.wait_until_idle()
    after = [metric(live, f"teal_{name}_tokens_total") for name in ("drafted", "accepted", "completion")]
    drafted, accepted, written = (now - then for now, then in zip(after, before, strict=True))
    assert accepted == usage["teal"]["accepted_tokens"] <= drafted
    assert accepted > 0 or chooses(live)
    assert written == 200
    assert metric(live, "teal_passes_total") - passes == 199 - accepted


def test_a_schema_and_a_level_of_its_own(live: Live, plain: Live) -> None:
    """A sparse request is no dense one: it decodes as it does elsewhere, and so does a dense one beside it."""
    levels = live.service.served.scheduler.levels.all
    requests = [{**asked(number), "n": 1} for number in range(8)]
    for number, request in enumerate(requests):
        if number % 2 and len(levels) > 1:
            request["extra_body"] = {"sparsity": levels[1 + number % 4 // 2]}
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    requests += [{**asked(6), "response_format": schema}, {**asked(7), "response_format": schema}]
    wanted = [answer(plain, request) for request in requests]
    with ThreadPoolExecutor(len(requests)) as pool:
        assert list(pool.map(lambda request: answer(live, request), requests)) == wanted


def test_what_it_says_of_itself(live: Live) -> None:
    with live.client() as client:
        told = client.models.retrieve(live.name).teal
        assert told["speculate"] in KINDS
        assert told["default_sparsity"] == 0
        assert told["sparsity"] == ([0.0, 0.3, 0.5] if "sparse" in told["speculate"] else [0.0])
        with pytest.raises(openai.BadRequestError, match="there is no sparsity 0.7"):
            client.chat.completions.create(model=live.name, extra_body={"sparsity": 0.7}, **asked(0))


def test_the_next_turn_goes_on_from_the_prompt_that_was_kept(live: Live, plain: Live) -> None:
    messages = [{"role": "user", "content": " ".join(WORDS * 2)}]
    for turn in range(3):
        request = {"messages": messages, "max_tokens": 40, "temperature": 0}
        with live.client() as client:
            found = client.chat.completions.create(model=live.name, **request)
        assert found.choices[0].message.content == streamed(plain, request)[0]
        assert (found.usage.prompt_tokens_details.cached_tokens > 0) == (turn > 0)
        messages = [*messages, {"role": "assistant", "content": found.choices[0].message.content}]
        messages.append({"role": "user", "content": "and then"})


def test_a_client_that_leaves_frees_its_slot(live: Live, wanted: list[list[tuple]]) -> None:
    """In the middle of what was drafted for several."""
    long = {"model": live.name, "max_tokens": 300, "temperature": 0, "stream": True}
    before = live.statistics().finished.get("cancelled", 0)
    with live.client() as client, ThreadPoolExecutor(4) as pool:
        answers = pool.map(lambda number: answer(live, asked(number)), range(4))
        for leaving in range(3):
            with client.chat.completions.create(messages=asked(leaving)["messages"], **long) as stream:
                next(iter(stream))
        assert list(answers) == wanted[:4]
    live.wait_until_idle()
    assert live.statistics().finished.get("cancelled", 0) - before >= 1
    assert live.statistics().cache_used == 0
    assert answer(live, asked(0)) == wanted[0]


def test_without_the_native_library(
    calibrated: Path, wanted: list[list[tuple]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers' forward verifies, of each slot by itself."""
    monkeypatch.setenv("TEAL_NATIVE", "off")
    how = {"speculate": "lookup+int8", "draft_tokens": 3}
    with serving(calibrated / "tiny", calibrated / "runs", **how, **OPTIONS) as live:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda number: answer(live, asked(number)), range(5)))
        assert found == wanted[:5]
        assert live.statistics().accepted_tokens > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"draft_tokens": 2}, r"draft_tokens \(flag --draft-tokens\) needs speculate"),
        ({"speculate": "int5"}, "'int5' is not lookup, sparse"),
        ({"speculate": "sparse", "sparsity": [0.0]}, "needs a sparsity above 0"),
        ({"speculate": "int8", "mode": "intrinsic"}, "leave out speculate"),
    ],
    ids=str,
)
def test_what_contradicts_drafts(options: dict, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ServeConfig(model="tiny", **options)


def test_a_model_that_cannot_take_tokens_back_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny(tmp_path / "long", "phi3-long")
    fails(capsys, 2, "rope type longrope", "serve", "--model", folder, "--speculate", "lookup", "--port", 0)
