"""Tuning tables on disk: those packaged with the kernels, one a GPU, and a user's own.

A table is JSON, one line an entry (`teal_kernels.tuning_entries.Entry`):

    {"version": 3, "entries": [
    {"inputs": 4096, "outputs": [4096], "dtype": "bfloat16", ..., "config": {...}, "measured": {...}},
    ...
    ]}

`teal bench --kernels --tune` writes a user's own.
"""

import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from tempfile import NamedTemporaryFile

from teal_kernels.tuning_entries import Entry, Provenance

PACKAGED = Path(__file__).with_name("tuning_tables")
TABLE_VERSION = 3


class TuningTableError(RuntimeError):
    """A table is damaged."""


def user_table(device_name: str) -> Path:
    """Where a user's own table of a GPU lies."""
    home = Path(os.environ.get("TEAL_HOME", Path.home() / ".cache" / "teal"))
    return home / "tuning" / f"{device_name.lower().replace(' ', '-')}.json"


def has_table(device_name: str) -> bool:
    """Whether anything was measured on this very GPU, by its user or packaged, that is taken: not by old versions."""
    own = user_table(device_name)
    for path in (own, PACKAGED / own.name):
        with suppress(TuningTableError):
            if path.is_file() and read_table(path):
                return True
    return False


def as_text(entries: Iterable[Entry]) -> str:
    """A table's JSON, one line an entry, so that a difference between two tables can be read."""
    lines = ",\n".join(json.dumps(entry.to_dict()) for entry in entries)
    return f'{{"version": {TABLE_VERSION}, "entries": [\n{lines}\n]}}\n'


def read_table(path: Path) -> tuple[Entry, ...]:
    """A table's entries; none of another version.

    Raises:
        TuningTableError: it is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != TABLE_VERSION:
            return ()
        return tuple(Entry.from_dict(entry) for entry in content["entries"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TuningTableError(
            f"the tuning table {path} cannot be read ({error!r}): delete it, or tune again"
        ) from error


def keep_entries(entries: Sequence[Entry], device_name: str, measured: Provenance) -> Path:
    """Add measured entries to the user's own table of a GPU, in place of those of the same product.

    Args:
        entries: what was measured.
        device_name: whose table.
        measured: where; goes into each of the entries.

    Returns:
        The table's file, which appears whole or not at all.
    """
    path = user_table(device_name)
    held: tuple[Entry, ...] = ()
    if path.is_file():
        with suppress(TuningTableError):  # what cannot be read is replaced
            held = read_table(path)
    new = {entry.product for entry in entries}
    kept = [entry for entry in held if entry.product not in new]
    _write(path, as_text([*kept, *(replace(entry, measured=measured) for entry in entries)]))
    table_of.cache_clear()
    return path


def _write(path: Path, text: str) -> None:
    """Under a name of its own first: two processes may tune at one time, and a disk may be full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False) as partial:
        try:
            partial.write(text)
            partial.flush()
            os.fsync(partial.fileno())
            Path(partial.name).replace(path)
        except BaseException:
            Path(partial.name).unlink(missing_ok=True)
            raise


@lru_cache(maxsize=8)
def table_of(device_name: str) -> tuple[Entry, ...]:
    """The user's entries and those packaged for this GPU, with those of others for products that it has none of, and
    for sparsities beyond what was measured of a product; where nobody has measured this GPU, those of others.

    Raises:
        TuningTableError: a table is damaged.
    """
    own = user_table(device_name)
    packaged = PACKAGED / own.name
    found = read_table(own) if own.is_file() else ()
    if packaged.is_file() or not found:
        others = (path for path in sorted(PACKAGED.glob("*.json")) if path != packaged)
        for path in (packaged, *others):
            if path.is_file():
                found += _added(found, read_table(path))
    return found


def _added(found: Sequence[Entry], others: Sequence[Entry]) -> tuple[Entry, ...]:
    """What another table adds: products that are new, and higher sparsities of those that are not.

    These are worth what they are beside the dense read that they were measured with: a product that was tuned at 50 %
    alone would say too little of 80 %, where a batch may begin to skip.
    """
    own = _by_product(found)
    added: list[Entry] = []
    for product, theirs in _by_product(others).items():
        mine = own.get(product)
        if mine is None:
            added += theirs
            continue
        reads = [min((e.cost for e in each if e.config.dense), default=0.0) for each in (mine, theirs)]
        most = max(entry.sparsity for entry in mine)
        if all(reads):
            share = reads[0] / reads[1]
            added += (_beside(entry, share) for entry in theirs if not entry.config.dense and entry.sparsity > most)
    return tuple(added)


def _by_product(entries: Iterable[Entry]) -> dict[tuple[int, tuple[int, ...], str, int, str], list[Entry]]:
    found: dict[tuple[int, tuple[int, ...], str, int, str], list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.product, []).append(entry)
    return found


def _beside(entry: Entry, share: float) -> Entry:
    because = "it took so much of the dense read that it was measured with, in another table"
    return replace(entry, deciding_microseconds=round(share * entry.cost, 2), deciding_because=because)
