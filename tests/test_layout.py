"""Files stay short enough to be read in one sitting."""

from pathlib import Path

_ROOT = Path(__file__).parents[1]
_MOST_LINES = 400


def test_no_file_is_long() -> None:
    files = [file for top in ("teal_cli", "kernels", "tests", "benchmarks") for file in (_ROOT / top).rglob("*.py")]
    long = {str(file.relative_to(_ROOT)) for file in files if len(file.read_text().splitlines()) > _MOST_LINES}
    assert len(files) > 200
    assert not long
