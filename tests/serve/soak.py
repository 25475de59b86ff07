"""Many requests of all kinds at a server: nothing leaks, nothing fails. `make soak` runs it as a program.

python tests/serve/soak.py --requests 2000 --fuzzed 1000 --out soak.json
"""

import http.client
import json
import random
import socket
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

PATIENCE = 120.0
LEAVE, MALFORMED = 0.10, 0.05
_WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "wise", "men", "stars"]
_NONSENSE = (
    b"",
    b"{",
    b"[]",
    b"\xff",
    b'{"model": 1}',
    b'{"model": "other", "prompt": "x"}',
    b'{"model": "tiny", "prompt": "x", "max_tokens": -1}',
    b'{"model": "tiny", "prompt": "x", "sparsity": 0.123}',
    b'{"model": "tiny", "messages": "x"}',
)
_PATHS = ("/v1/chat/completions", "/v1/completions")


@dataclass
class Counts:
    """What was asked and answered."""

    asked: Counter[str] = field(default_factory=Counter)
    """good, leaving, malformed, fuzzed"""
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    """What should not have been, such as a 500, or a text that lacks tokens."""


def _connect(port: int) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)


def _post(port: int, path: str, body: bytes) -> tuple[int, bytes]:
    connection = _connect(port)
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def _question(random: random.Random, levels: list[float], most: int) -> tuple[str, dict]:
    words = " ".join(random.choices(_WORDS, k=random.randint(1, 12)))
    asked = {
        "model": "tiny",
        "max_tokens": random.randint(1, most),
        "temperature": random.choice([0, 0, 1]),
        "seed": random.randrange(1 << 20),
        "sparsity": random.choice(levels),
        "stream": random.random() < 0.5,
    }
    if random.random() < 0.2:
        asked["stop"] = [random.choice("abcdef")]
    if random.random() < 0.5:
        return _PATHS[1], asked | {"prompt": words, "n": random.choice([1, 1, 1, 2])}
    turns = [{"role": "user", "content": words}] * random.choice([1, 1, 3])
    turns = [{**turn, "role": ("user", "assistant")[at % 2]} for at, turn in enumerate(turns)]
    return _PATHS[0], asked | {"messages": turns}


def _ask(port: int, random: random.Random, levels: list[float], most: int, counts: Counts) -> None:
    path, asked = _question(random, levels, most)
    body = json.dumps(asked).encode()
    kind = random.random()
    if kind < LEAVE:
        counts.asked["leaving"] += 1
        _leave(port, path, body, random)
        return
    if kind < LEAVE + MALFORMED:
        counts.asked["malformed"] += 1
        status, answer = _post(port, random.choice(_PATHS), random.choice(_NONSENSE))
        counts.statuses[status] += 1
        if not 400 <= status < 500 or not json.loads(answer)["error"]["message"]:
            counts.wrong.append(f"nonsense: {status} {answer[:200]!r}")
        return
    counts.asked["good"] += 1
    status, answer = _post(port, path, body)
    counts.statuses[status] += 1
    if status == 429:
        return
    if status != 200:
        counts.wrong.append(f"{status} {answer[:200]!r} to {body[:300]!r}")
    elif asked["stream"]:
        if not answer.endswith(b"data: [DONE]\n\n") or b'"error"' in answer:
            counts.wrong.append(f"a stream ends in {answer[-200:]!r}")
    elif "stop" not in asked and not 0 < _tokens(answer) <= asked["max_tokens"] * asked.get("n", 1):
        counts.wrong.append(f"tokens: {answer[-300:]!r}")


def _tokens(answer: bytes) -> int:
    return json.loads(answer)["usage"]["completion_tokens"]


def _leave(port: int, path: str, body: bytes, random: random.Random) -> None:
    """Go away: before the answer, within it, or within the request."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        when = random.randrange(3)
        connection.sendall(request[: random.randrange(len(request))] if when == 0 else request)
        if when == 2:
            connection.recv(random.randint(1, 600))


def soak(
    port: int,
    requests: int,
    *,
    levels: list[float],
    most: int = 24,
    seed: int = 0,
    together: int = 16,
    every: Callable[[int], None] = lambda number: None,
) -> Counts:
    """Ask so many times, by several clients at once; a share leaves, another sends nonsense."""
    counts, lock, done = Counts(), threading.Lock(), Counter[str]()

    def one(number: int) -> None:
        mine = Counts()
        try:
            _ask(port, random.Random(seed * 1_000_003 + number), levels, most, mine)
        except Exception as error:
            mine.wrong.append(f"request {number}: {type(error).__name__}: {error}")
        with lock:
            counts.asked.update(mine.asked)
            counts.statuses.update(mine.statuses)
            counts.wrong += mine.wrong
            done["all"] += 1
            every(done["all"])

    with ThreadPoolExecutor(together) as pool:
        list(pool.map(one, range(requests)))
    return counts


_VALUES = (
    *("null", "true", "-1", "0", "1", "2", "1e308", "-1e400", "NaN", "9" * 400, "0.5", '""', '"a"', '"\\u0000"'),
    *('"\\ud800"', "[]", "{}", "[[]]", '[""]', "[1, 2]", '{"a": 1}', "[null]"),
    *('"' + "fox " * 2000 + '"', "[" * 300 + "]" * 300),
    *('[{"role": "user", "content": "x"}]', '[{"role": "user", "content": [{"type": "text", "text": "x"}]}]'),
    *('[{"role": "tool", "content": "x", "tool_call_id": "y"}]', '[{"type": "function", "function": {"name": "f"}}]'),
    '{"type": "json_object"}',
    '{"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer"}}}',
    *('{"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}}', '{"include_usage": true}'),
)
_KEYS = (
    *("model", "messages", "prompt", "stream", "stream_options", "temperature", "top_p", "top_k", "seed", "max_tokens"),
    *("max_completion_tokens", "stop", "n", "sparsity", "logprobs", "top_logprobs", "response_format", "tools", "user"),
    *("tool_choice", "logit_bias", "frequency_penalty", "echo", "suffix", "best_of", "metadata", "unknown", "", "é"),
)
_HEADS = (
    *(b"GET / HTTP/1.1\r\n\r\n", b"NONSENSE\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\nContent-Length: x\r\n\r\n"),
    *(b"\x00\x01\x02\r\n\r\n", b"GET /%00 HTTP/1.0\r\n\r\n"),
    b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
    b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
)


def _fuzzed(random: random.Random) -> tuple[str, bytes]:
    """A path, and a request with some values that are anything."""
    fields, path = {"model": '"tiny"', "max_tokens": "2", "prompt": '"fox"'}, _PATHS[1]
    if random.random() < 0.5:
        path = _PATHS[0]
        del fields["prompt"]
        fields["messages"] = '[{"role": "user", "content": "fox"}]'
    for _ in range(random.randint(0, 3)):
        fields[random.choice(_KEYS)] = random.choice(_VALUES)
    body = "{" + ", ".join(f"{json.dumps(key)}: {value}" for key, value in fields.items()) + "}"
    data = bytearray(body.encode())
    if random.random() < 0.2:
        for _ in range(random.randint(1, 4)):
            data[random.randrange(len(data))] = random.randrange(256)
    return path, bytes(data)


def fuzz(port: int, requests: int, *, seed: int = 0) -> Counts:
    """Ask for anything, so many times: each answer is an answer, or an error with a reason."""
    counts, dice = Counts(), random.Random(seed)
    for _ in range(requests):
        counts.asked["fuzzed"] += 1
        if dice.random() < 0.1:
            _send_raw(port, dice.choice(_HEADS), counts)
            continue
        path, body = _fuzzed(dice)
        status, answer = _post(port, path, body)
        counts.statuses[status] += 1
        has_reason = status == 200 or (400 <= status < 500 and json.loads(answer)["error"]["message"])
        if has_reason and b"Traceback" not in answer:
            continue
        counts.wrong.append(f"{status} {answer[:300]!r} to {body[:600]!r}")
    return counts


def _send_raw(port: int, head: bytes, counts: Counts) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
        connection.sendall(head)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        with suppress(ConnectionError):
            while piece := connection.recv(65536):
                answer += piece
    status = int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.") else 0
    counts.statuses[status] += 1
    if status >= 500 or b"Traceback" in answer:
        counts.wrong.append(f"{status} {answer[:300]!r} to {head[:100]!r}")
