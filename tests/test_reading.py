"""Files of others: kind, size and encoding are checked before the content is looked at."""

import os
from pathlib import Path

import pytest

from teal_cli.errors import ArtefactError, UsageError
from teal_cli.reading import MOST_YAML_BYTES, read_bytes, read_json, read_yaml


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_only_ordinary_files_are_opened(make) -> None:
    """A pipe would hang, a device never end."""
    make(Path("f"))
    for read in (read_json, read_yaml):
        with pytest.raises((ArtefactError, UsageError), match="thing f is not an ordinary file"):
            read(Path("f"), "thing")


def test_sizes() -> None:
    Path("f").write_bytes(b"12345")
    Path("link").symlink_to("f")
    assert read_bytes(Path("link"), "thing", most=5) == b"12345"
    with pytest.raises(ArtefactError, match=r"thing f has 5 bytes; more than 4 are not read"):
        read_bytes(Path("f"), "thing", most=4)
    with pytest.raises(ArtefactError, match="has more than 4 bytes"):  # and says that it has none
        read_bytes(Path("/proc/self/status"), "thing", most=4)


@pytest.mark.parametrize("path", ["a\0b", "x" * 300, "f/below"])
def test_paths_that_the_system_does_not_take(path: str) -> None:
    Path("f").write_text("")
    with pytest.raises(ArtefactError, match="cannot be read"):
        read_bytes(Path(path), "thing", most=4)
    with pytest.raises(ArtefactError, match="thing nowhere does not exist"):
        read_bytes(Path("nowhere"), "thing", most=4)


@pytest.mark.parametrize(
    "content",
    [b"{", b"", b"\xff\xfe{}", b'{"a": ' + b"[" * 100_000, b'{"a": ' + b"9" * 5_000 + b"}", b"\x00" * 9],
    ids=["open", "empty", "utf-16", "deep", "number", "nul"],
)
def test_what_is_no_json(content: bytes) -> None:
    Path("f.json").write_bytes(content)
    with pytest.raises(ArtefactError, match="thing f.json is not valid JSON"):
        read_json(Path("f.json"), "thing")


def test_json() -> None:
    Path("f.json").write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa9"}')
    assert read_json(Path("f.json"), "thing") == {"a": "é"}
    Path("f.json").write_text("[]")
    with pytest.raises(ArtefactError, match="does not hold a mapping"):
        read_json(Path("f.json"), "thing")


_BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("seed: 2020-13-45", "month must be in 1..12"),
        ("seed: !!int x", "not valid YAML"),
        ("seed: !!timestamp x", "not valid YAML"),
        ("seed: " + "[" * 5_000, "nested too deep"),
        ("seed: " + "9" * 5_000, "4300 digits"),
        ("seed: !" + "x" * 9_000 + " y", "more characters"),
        ("seed: 1\nmodel: m\nseed: 2", r"key 'seed' stands twice \(line 3\)"),
        ("bench: {batch: 1, batch: 2}", "key 'batch' stands twice"),
        ("seed: &a [*a]", "what it is a part of"),
        (_BOMB, "aliases stand for more than 100,000 values"),
        ("1: 2", "mapping of keys"),
        ("#" * (MOST_YAML_BYTES + 1), "are not read"),
    ],
)
def test_what_is_no_configuration(content: str, message: str) -> None:
    Path("c.yaml").write_text(content)
    with pytest.raises(UsageError, match=message) as caught:
        read_yaml(Path("c.yaml"))
    assert len(str(caught.value)) < 700


def test_yaml() -> None:
    Path("c.yaml").write_bytes(b"\xef\xbb\xbfa: &a {x: 1}\nb: *a\nc: *a\n")
    assert read_yaml(Path("c.yaml")) == {"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1}}
    Path("c.yaml").write_text("# nothing\n")
    assert read_yaml(Path("c.yaml")) == {}
    Path("c.yaml").write_bytes("model: é".encode("latin-1"))
    with pytest.raises(UsageError, match="it is not UTF-8"):
        read_yaml(Path("c.yaml"))
