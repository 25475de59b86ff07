"""Reading files that somebody else wrote: kind, size and encoding are checked before the content."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import yaml

from teal_cli.errors import ArtefactError, TealError, UsageError, shortened

MOST_JSON_BYTES = 64 << 20
"""The index of a large sharded model has a few MB."""
MOST_YAML_BYTES = 256 << 10
"""PyYAML reads about 100 KB a second; the allocation file of a 70B model has 50 KB."""
_MOST_YAML_NODES = 100_000
"""Values with every alias written out: a few lines can stand for billions of them."""
_LONGEST_DETAIL = 500


def is_ordinary(status: os.stat_result) -> bool:
    """Whether a path is an ordinary file: no folder, and no pipe or device, whose end nobody knows.

    Args:
        status: what `Path.stat` says of it, of a link what it leads to.
    """
    return stat.S_ISREG(status.st_mode)


def read_bytes(path: Path, what: str, *, most: int, error: type[TealError] = ArtefactError) -> bytes:
    """The content of an ordinary file.

    Args:
        path: links are followed.
        what: names the file in errors.
        most: bytes; a larger file is refused unread.
        error: what is raised.

    Raises:
        TealError: as `error`: no such file, a folder, a pipe or a device, too large, or not readable.
    """
    try:
        status = path.stat()
        if not is_ordinary(status):
            raise error(f"{what} {path} is not an ordinary file")
        if status.st_size > most:
            raise error(f"{what} {path} has {status.st_size:,} bytes; more than {most:,} are not read")
        with path.open("rb") as stream:
            content = stream.read(most + 1)  # a file of /proc says that it has 0 bytes
    except FileNotFoundError as reason:
        raise error(f"{what} {path} does not exist") from reason
    except (OSError, ValueError) as reason:  # ValueError: a NUL in the path
        raise error(f"{what} {str(path)!r} cannot be read: {getattr(reason, 'strerror', None) or reason}") from reason
    if len(content) > most:
        raise error(f"{what} {path} has more than {most:,} bytes, which are not read")
    return content


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON mapping.

    Args:
        path: the file.
        what: names it in errors.

    Raises:
        ArtefactError: missing, not an ordinary file, too large, not JSON, or not a mapping.
    """
    content = read_bytes(path, what, most=MOST_JSON_BYTES)
    try:
        found = json.loads(content.decode("utf-8-sig"))
    # RecursionError: nested too deep; ValueError: no JSON, no UTF-8, or a number of thousands of digits.
    except (ValueError, RecursionError) as reason:
        raise ArtefactError(
            f"{what} {path} is not valid JSON: it is truncated or was edited; make it again"
        ) from reason
    if not isinstance(found, dict):
        raise ArtefactError(f"{what} {path} does not hold a mapping; make it again")
    return found


def read_yaml(path: Path, what: str = "config file") -> dict[str, Any]:
    """A YAML mapping from a file.

    Args:
        path: YAML, or JSON, which is YAML too.
        what: names the file in errors.

    Raises:
        UsageError: missing, not an ordinary file, too large, broken YAML, a key twice, or not a mapping.
    """
    content = read_bytes(path, what, most=MOST_YAML_BYTES, error=UsageError)
    try:
        found = _safe_load(content.decode("utf-8-sig"))
    except UnicodeDecodeError as reason:
        raise UsageError(
            f"{what} {path} cannot be read: it is not UTF-8 ({reason.reason} at byte {reason.start})"
        ) from reason
    # The constructors of yaml's own tags (!!int x, a date such as 2020-13-45) raise whatever comes.
    except (
        yaml.YAMLError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
        RecursionError,
        OverflowError,
    ) as reason:
        detail = "it is nested too deep" if isinstance(reason, RecursionError) else " ".join(str(reason).split())
        raise UsageError(f"{what} {path} is not valid YAML: {shortened(detail, _LONGEST_DETAIL)}") from reason
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise UsageError(f"{what} {path}: the top must be a mapping of keys to values")
    return found


def _safe_load(text: str) -> Any:
    """As `yaml.safe_load`, but a mapping has each key once, and aliases do not multiply without end."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_node(node, {})
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _check_node(node: yaml.Node, sizes: dict[int, int]) -> int:
    """How many values a node stands for, aliases written out.

    Args:
        node: of a document.
        sizes: of the nodes met before, by identity; 0 of one that is being counted.

    Raises:
        yaml.YAMLError: a key twice, a node inside itself, or too many values.
    """
    if id(node) in sizes:
        if sizes[id(node)] == 0:
            raise yaml.YAMLError("an alias refers to what it is a part of")
        return sizes[id(node)]
    sizes[id(node)] = 0
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        seen: set[tuple[str, str]] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.YAMLError(f"key {key.value[:100]!r} stands twice (line {key.start_mark.line + 1})")
                seen.add((key.tag, key.value))
            children += [key, value]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    size = 1 + sum(_check_node(child, sizes) for child in children)
    if size > _MOST_YAML_NODES:
        raise yaml.YAMLError(f"its aliases stand for more than {_MOST_YAML_NODES:,} values")
    sizes[id(node)] = size
    return size
