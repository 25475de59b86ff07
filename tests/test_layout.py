"""Files stay short enough to be read in one sitting."""

from collections import Counter
from pathlib import Path

_ROOT = Path(__file__).parents[1]
_MOST_LINES = 400


def test_no_file_is_long() -> None:
    files = [file for top in ("teal_cli", "kernels", "tests", "benchmarks") for file in (_ROOT / top).rglob("*.py")]
    long = {str(file.relative_to(_ROOT)) for file in files if len(file.read_text().splitlines()) > _MOST_LINES}
    assert len(files) > 200
    assert not long


def test_test_files_have_names_of_their_own() -> None:
    """In folders that are no packages pytest refuses two of one name, when it collects both."""
    names = Counter(file.name for file in (_ROOT / "tests").rglob("test_*.py"))
    assert len(names) > 150
    assert not [name for name, count in names.items() if count > 1]
