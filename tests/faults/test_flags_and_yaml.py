"""Flags and YAML of any kind end with exit 2 or 3 and one line, before anything is loaded."""

import os
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from attack import WRONG_VALUES, attack

from teal_cli.config import VERB_CONFIGS
from teal_cli.config_files import flag_name, keys_of

_VERBS = ("calibrate", "export", "generate", "bench", "eval")
_WORDS = ("", " ", "-", "--", "\0", "nan", "1e999", "-1", "0", str(1 << 64), "9" * 5_000, "a" * 70_000, "[", "a:b", "/")
_LONG = ("tasks",)
"""The harness itself takes 5 to 15 s to list the 14,000 tasks that it knows."""


@pytest.mark.parametrize("verb", _VERBS)
def test_flags(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(f"flags {verb}")
    keys = [key for key in keys_of(VERB_CONFIGS[verb]) if key not in ("model", "runs", "json", *_LONG)]
    for _ in range(30):
        given = [f"{flag_name(key)}={rng.choice(_WORDS)}" for key in rng.sample(keys, 2)]
        outcome = attack(capsys, verb, "--model", "no-such-model", *given)
        assert outcome.code in (2, 3)


def _value(rng: random.Random, depth: int = 0) -> Any:
    if depth < 3 and rng.random() < 0.4:
        inner = [_value(rng, depth + 1) for _ in range(rng.randrange(3))]
        return inner if rng.random() < 0.5 else {str(index): value for index, value in enumerate(inner)}
    return rng.choice([value for value in WRONG_VALUES if not isinstance(value, int) or abs(value) < 1 << 63])


@pytest.mark.parametrize("verb", [*_VERBS, "run"])
def test_yaml_values(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(f"yaml {verb}")
    section = "generate" if verb == "run" else verb
    keys = [key for key in keys_of(VERB_CONFIGS[section]) if key not in ("model", "runs", "json")]
    file = Path("config.yaml")
    for _ in range(20):
        own = {key: _value(rng) for key in rng.sample(keys, 2)}
        content = own if rng.random() < 0.5 else {section: own if rng.random() < 0.8 else _value(rng)}
        file.write_text(yaml.safe_dump({"model": "no-such-model", **content}))
        given = (verb, file) if verb == "run" else (verb, "--config", file)
        outcome = attack(capsys, *given)
        assert outcome.code in (2, 3)


_BOMB = "b: &b [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in ("bc", "cd", "de", "ef", "fg", "gh")
)


@pytest.mark.parametrize(
    "text",
    [
        *("seed: 2020-13-45", "seed: !!int x", "seed: !!timestamp x", "seed: !!python/object/apply:os.getpid []"),
        *("a: " + "[" * 3_000, "seed: 1\nseed: 2", "seed: " + "9" * 5_000, "\x00", "- 1", "1: 2", "seed: &a [*a]"),
        _BOMB,
        *("seed: [" + "1, " * 100_000 + "1]", "x" * 200_000 + ": 1"),
    ],
    ids=lambda text: text[:20],
)
def test_yaml_that_is_none(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = Path("config.yaml")
    file.write_text(text)
    assert attack(capsys, "calibrate", "--config", file).code == 2
    assert attack(capsys, "run", file).code == 2


def test_what_is_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Devices, pipes that nobody writes to, folders and names that cannot be: refused, not waited for."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in ("/dev/zero", "/dev/stdin", pipe, tmp_path, "n" * 300, "a\0b", ""):
        assert attack(capsys, "run", path).code == 2
        assert attack(capsys, "calibrate", "--config", path).code == 2
        assert attack(capsys, "inspect", path).code in (2, 3)
        assert attack(capsys, "calibrate", "--model", path).code in (2, 3)
        if path != "":
            assert attack(capsys, "calibrate", "--architecture", path, "--model", "no-such-model").code in (2, 3)
