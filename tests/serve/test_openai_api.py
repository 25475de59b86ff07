"""Chats and completions, asked for by OpenAI's own client: the texts are those of `teal generate`."""

import json
from pathlib import Path

import live_server
import openai
import pytest
from live_server import Live
from openai import OpenAI

from teal_cli.config import GenerateConfig
from teal_cli.console import QUIET
from teal_cli.steps.generate import Generator

calibrated = pytest.fixture(scope="module")(live_server.calibrated)
live = pytest.fixture(scope="module")(live_server.live)
client = pytest.fixture(live_server.client)

HELLO = [{"role": "user", "content": "the quick brown fox"}]
LONGER = [
    {"role": "user", "content": "the quick brown fox"},
    {"role": "assistant", "content": "jumps"},
    {"role": "user", "content": "over the lazy dog"},
]


@pytest.fixture(scope="module")
def generator(calibrated: Path, live: Live) -> Generator:
    return Generator(_config(calibrated), QUIET)


def _config(calibrated: Path, **options) -> GenerateConfig:
    shared = {"model": str(calibrated / "tiny"), "runs": calibrated / "runs", "dtype": "float32", "device": "cpu"}
    return GenerateConfig(**{"sparsity": 0.5, "max_new_tokens": 24, **shared, **options})


def _ask(client: OpenAI, live: Live, messages=HELLO, **options):
    return client.chat.completions.create(
        **{"model": live.name, "messages": messages, "max_tokens": 24, "temperature": 0, **options}
    )


def _streamed(client: OpenAI, live: Live, messages=HELLO, **options):
    chunks = list(_ask(client, live, messages, stream=True, stream_options={"include_usage": True}, **options))
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    return text, chunks


@pytest.mark.parametrize("messages", [HELLO, LONGER], ids=["one turn", "two turns"])
def test_a_chat_is_what_generate_writes(live: Live, client: OpenAI, generator: Generator, messages: list) -> None:
    wanted = generator.reply(messages, config=generator.config)
    found = _ask(client, live, messages)
    assert found.choices[0].message.content == wanted.text
    assert found.choices[0].message.role == "assistant"
    assert found.choices[0].finish_reason == "length"
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (wanted.prompt_tokens, wanted.tokens)
    assert found.usage.total_tokens == wanted.prompt_tokens + wanted.tokens
    text, chunks = _streamed(client, live, messages)
    assert text == wanted.text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == wanted.tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_each_level_of_sparsity_answers(live: Live, client: OpenAI, calibrated: Path, generator: Generator) -> None:
    texts = {}
    for level in (0.0, 0.3, 0.5):
        reply = Generator(_config(calibrated, sparsity=level), QUIET).reply(HELLO)
        found = _ask(client, live, extra_body={"sparsity": level})
        texts[level] = found.choices[0].message.content
        assert texts[level] == reply.text
        assert found.usage.teal["sparsity"] == level
    assert len(set(texts.values())) == 3
    assert _ask(client, live).choices[0].message.content == texts[0.5]  # the first level that was named


def test_stop_strings_end_a_reply(live: Live, client: OpenAI) -> None:
    whole = _ask(client, live, max_tokens=60).choices[0].message.content
    before = live.statistics().finished
    stop = whole[20:23]
    at = whole.index(stop)
    found = _ask(client, live, max_tokens=60, stop=["no such text", stop])
    assert (found.choices[0].message.content, found.choices[0].finish_reason) == (whole[:at], "stop")
    text, chunks = _streamed(client, live, max_tokens=60, stop=stop)
    assert text == whole[:at]
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    live.wait_until_idle()
    assert found.usage.completion_tokens < 60
    # A reply may reach its length before the scheduler hears of the stop string, but nobody cancels it.
    assert live.statistics().finished.get("cancelled", 0) == before.get("cancelled", 0)


def test_a_seed_gives_the_same_numbers(live: Live, client: OpenAI, generator: Generator, calibrated: Path) -> None:
    options = {"temperature": 0.9, "top_p": 0.95, "extra_body": {"top_k": 50}}
    first, again, other = (_ask(client, live, seed=seed, **options).choices[0].message.content for seed in (7, 7, 8))
    wanted = generator.reply(HELLO, config=_config(calibrated, temperature=0.9, top_p=0.95, top_k=50, seed=7))
    assert first == again == wanted.text
    assert other != first
    several = _ask(client, live, seed=7, n=2, **options)
    assert [choice.message.content for choice in several.choices] == [first, other]
    assert several.usage.prompt_tokens == wanted.prompt_tokens
    assert len({_ask(client, live, temperature=2).choices[0].message.content for _ in range(3)}) == 3


def test_probabilities_of_tokens(live: Live, client: OpenAI) -> None:
    found = _ask(client, live, logprobs=True, top_logprobs=3, max_tokens=8)
    entries = found.choices[0].logprobs.content
    assert len(entries) == 8
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == entry.logprob < 0  # greedy
        likely = [one.logprob for one in entry.top_logprobs]
        assert likely == sorted(likely, reverse=True)
        assert entry.bytes is None or bytes(entry.bytes).decode() == entry.token
    chunks = _streamed(client, live, logprobs=True, max_tokens=8)[1]
    streamed = [one for c in chunks for o in c.choices if o.logprobs for one in o.logprobs.content]
    assert [(one.token, one.logprob) for one in streamed] == [(one.token, one.logprob) for one in entries]
    assert streamed[0].top_logprobs == []


def test_completions_continue_texts(live: Live, client: OpenAI, calibrated: Path) -> None:
    plain = Generator(_config(calibrated, chat=False), QUIET)
    prompts = ["the quick", "seven wise men"]
    wanted = [plain.reply([{"role": "user", "content": prompt}]).text for prompt in prompts]
    asked = {"model": live.name, "max_tokens": 24, "temperature": 0}
    found = client.completions.create(prompt=prompts, n=2, logprobs=1, **asked)
    assert [choice.text for choice in found.choices] == [text for text in wanted for _ in range(2)]
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    logprobs = found.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 24
    tokens = [plain.tokenizer(prompt)["input_ids"] for prompt in prompts]
    found = client.completions.create(prompt=tokens, **asked)
    assert [choice.text for choice in found.choices] == wanted
    assert found.usage.prompt_tokens == sum(map(len, tokens))
    chunks = list(client.completions.create(prompt=prompts, stream=True, **asked))
    texts = ["", ""]
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == wanted


SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "name": {"enum": ["fox", "dog"]}},
    "required": ["ok", "name"],
    "additionalProperties": False,
}


def test_a_reply_follows_a_schema(live: Live, client: OpenAI) -> None:
    pytest.importorskip("llguidance")
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    for temperature, seed in ((0, 0), (1.5, 1), (1.5, 2)):
        found = _ask(client, live, temperature=temperature, seed=seed, max_tokens=60, response_format=wanted)
        value = json.loads(found.choices[0].message.content)
        assert found.choices[0].finish_reason == "stop"
        assert set(value) == {"ok", "name"}
        assert isinstance(value["ok"], bool)
        assert value["name"] in ("fox", "dog")
    found = _ask(client, live, max_tokens=30, response_format={"type": "json_object"})
    assert found.choices[0].message.content.startswith("{")
    bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "objekt"}}}
    with pytest.raises(openai.BadRequestError, match="the schema cannot be followed"):
        _ask(client, live, response_format=bad)


def test_models_are_listed_with_their_levels(live: Live, client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == client.models.retrieve(live.name).id == "tiny"
    assert model.teal["sparsity"] == [0.0, 0.3, 0.5]
    assert model.teal["default_sparsity"] == 0.5
    assert model.teal["chat"] is True
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


@pytest.mark.parametrize(
    ("options", "status", "said", "param"),
    [
        ({"model": "gpt-9"}, 404, "there is no model 'gpt-9' here, but 'tiny'", "model"),
        ({"extra_body": {"temprature": 1}}, 400, "did you mean 'temperature'", "temprature"),
        ({"extra_body": {"sparsity": 0.4}}, 400, "there is no sparsity 0.4 here, but 0, 0.3, 0.5", "sparsity"),
        ({"extra_body": {"sparsity": 1}}, 400, "less than 1", "sparsity"),
        ({"max_tokens": 201}, 400, "at most 200", "max_tokens"),
        ({"max_tokens": 0}, 400, "greater than or equal to 1", "max_tokens"),
        ({"messages": [{"role": "user", "content": "fox " * 300}]}, 400, "exceed the 256 tokens", None),
        ({"messages": [{"role": "user", "content": "fox " * 40}], "max_tokens": 199}, 400, "exceed the 256", None),
        ({"messages": []}, 400, "at least 1 item, not 0", "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages.0.role", "messages.0.role"),
        ({"messages": [{"role": "user"}]}, 400, "content is missing", "messages.0"),
        ({"n": 9}, 400, "less than or equal to 8", "n"),
        ({"frequency_penalty": 0.5}, 400, "this is not served here", "frequency_penalty"),
        ({"logit_bias": {"7": -100}}, 400, "this is not served here", "logit_bias"),
        ({"temperature": -1}, 400, "temperature", "temperature"),
        ({"top_logprobs": 2}, 400, "top_logprobs goes with logprobs", None),
        ({"stop": [""]}, 400, "at least 1 character", "stop.0"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options goes with stream", None),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "has no tools", "tools"),
    ],
)
def test_a_wrong_request_is_told_why(
    live: Live, client: OpenAI, options: dict, status: int, said: str, param: str | None
) -> None:
    with pytest.raises(openai.APIStatusError) as raised:
        _ask(client, live, **options)
    assert raised.value.status_code == status
    assert said in raised.value.message
    assert raised.value.param == param
    assert raised.value.type in ("invalid_request_error", "not_found_error")


def test_a_reply_may_be_sent_back_as_it_was_dumped(live: Live, client: OpenAI) -> None:
    first = _ask(client, live, max_tokens=3).choices[0].message
    for message in (first, first.model_dump()):
        assert _ask(client, live, [*HELLO, message, *HELLO], max_tokens=3).choices[0].message.role == "assistant"


def test_more_replies_than_can_wait_are_refused(live: Live, client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="80 replies at once: at most 72 here"):
        client.completions.create(model=live.name, prompt=["fox"] * 10, n=8)
