"""A table of texts that are shown as they are: no markup, no control characters, nothing cut."""

from typing import Any

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from teal_cli.errors import printable

_NARROWEST = 4
"""Letters of a column on a narrow terminal; below, a table becomes wider than the terminal."""


class PlainTable(Table):
    """A heading, and columns of texts, which models, artefacts and results may have written.

    Args:
        heading: stands above; lines are divided by line breaks.
        columns: their headers.
        figures: columns but the first hold figures, to the right; else texts.
        show_header: False where the first column says what each row is.
    """

    def __init__(self, heading: str, *columns: str, figures: bool = True, show_header: bool = True) -> None:
        super().__init__(show_header=show_header)
        self.heading, self.figures = printable(heading), figures
        for index, column in enumerate(columns):
            right = figures and index > 0
            self.add_column(_text(column), justify="right" if right else "left", overflow="fold", min_width=1)
            self._widen(index, column)

    def add_row(self, *cells: Any, **style: Any) -> None:
        """A row of as many texts as there are columns."""
        super().add_row(*map(_text, cells), **style)
        for index, cell in enumerate(cells):
            self._widen(index, cell)

    def keep_words(self) -> None:
        """Fold between words alone: a path stays whole, and the table becomes wider where one needs it."""
        for column in self.columns:
            words = [word for cell in (column.header, *column.cells) for word in _text(cell).plain.split()]
            column.min_width = max(map(cell_len, words), default=1)

    def _widen(self, index: int, cell: object) -> None:
        column = self.columns[index]
        longest = max(map(len, _text(cell).plain.split()), default=0)
        column.min_width = max(column.min_width or 0, min(longest, _NARROWEST))


def facts_table(heading: str) -> PlainTable:
    """An empty table of labels and what there is to say about each."""
    return PlainTable(heading, "", "", figures=False, show_header=False)


def _text(cell: object) -> Text:
    return Text(printable(str(cell)))
