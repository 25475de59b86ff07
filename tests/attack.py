"""Attacks on the command line, in process: whatever comes in, what comes out is an exit code and one line."""

import copy
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from teal_cli.cli import run

LONGEST_LINE = 2_500
MOST_SECONDS = 10.0
WRONG_VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 1 << 62, 10**400, 0.5, -1e308, float("nan"), float("inf")),
    *("", "nan", "\x1b[31m[/red]", "x" * 100_000, [], [[]], ["a", 1], {}, {"a": {"b": None}}),
)
"""What stands in the place of any value of a file."""


@dataclass(frozen=True)
class Outcome:
    """How one command line ended."""

    code: int
    out: str
    err: str


def attack(capsys: pytest.CaptureFixture[str], *arguments: object) -> Outcome:
    """Run one command line; fails on exit 1, a traceback, escape sequences, an endless line, or more than 10 s."""
    capsys.readouterr()
    started = time.perf_counter()
    code = run([str(argument) for argument in arguments])
    seconds = time.perf_counter() - started
    captured = capsys.readouterr()
    what = f"teal {' '.join(map(str, arguments))[:300]} -> {code}: {captured.err[-500:]!r}"
    assert code in (0, 2, 3, 4), what
    assert "Traceback" not in captured.err, what
    assert "\x1b" not in captured.err + captured.out, what
    assert max(map(len, captured.err.splitlines()), default=0) <= LONGEST_LINE, what
    assert seconds < MOST_SECONDS, what
    if code:
        assert captured.err.splitlines()[-1].startswith("teal: "), what
    return Outcome(code, captured.out, captured.err)


def leaves(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values inside JSON, mappings and lists too; of long lists and vocabularies the first two."""
    if path:
        yield path
    inside: list[tuple[Any, Any]] = []
    if isinstance(content, dict):
        inside = list(content.items())[: 2 if len(content) > 100 else None]
    elif isinstance(content, list):
        inside = list(enumerate(content[:2]))
    for key, value in inside:
        yield from leaves(value, (*path, key))


def damaged(content: Any, rng: random.Random, count: int) -> Iterator[tuple[str, Any]]:
    """So many copies of a JSON value with one entry each deleted or replaced, and what was done."""
    paths = list(leaves(content))
    for _ in range(count):
        path = rng.choice(paths)
        changed = copy.deepcopy(content)
        holder = changed
        for key in path[:-1]:
            holder = holder[key]
        if rng.random() < 0.2:
            del holder[path[-1]]
            yield f"{path} deleted", changed
        else:
            value = rng.choice(WRONG_VALUES)
            holder[path[-1]] = value
            yield f"{path} = {str(value)[:40] if not isinstance(value, int) else 'a number'}", changed


def damaged_bytes(content: bytes, rng: random.Random, count: int) -> Iterator[tuple[str, bytes]]:
    """So many copies of a file's bytes, cut short or with one bit flipped."""
    for _ in range(count):
        at = rng.randrange(len(content))
        if rng.random() < 0.3:
            yield f"cut after {at} bytes", content[:at]
        else:
            flipped = bytearray(content)
            flipped[at] ^= 1 << rng.randrange(8)
            yield f"a bit of byte {at} flipped", bytes(flipped)


def each_damaged(file: Path, rng: random.Random, *, values: int, bits: int, then: Callable[[str], None]) -> None:
    """Put damaged versions of a file in its place, one after another, and call `then`; the file is whole afterwards."""
    whole = file.read_bytes()
    versions: list[tuple[str, bytes]] = list(damaged_bytes(whole, rng, bits))
    if values:
        versions += [(what, json.dumps(new).encode()) for what, new in damaged(json.loads(whole), rng, values)]
    for what, content in versions:
        file.unlink()  # it may be a link to another's
        file.write_bytes(content)
        try:
            then(f"{file.name}: {what}")
        finally:
            file.unlink()
            file.write_bytes(whole)
