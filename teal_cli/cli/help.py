"""The help of a verb: typer's table where it fits, else a list that names every flag in full."""

import shutil
from typing import Any

from typer.core import TyperCommand

_WIDTH_OF_TABLE = 110
"""Columns of a terminal; with fewer the table cuts the names of flags."""


class VerbCommand(TyperCommand):
    """A verb."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The whole help, into `formatter` or onto stdout."""
        if shutil.get_terminal_size().columns < _WIDTH_OF_TABLE:
            self.rich_markup_mode = None
        super().format_help(ctx, formatter)
