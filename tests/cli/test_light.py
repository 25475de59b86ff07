"""What must stay cheap: `import teal_cli`, `teal --help`, a mistake on the command line."""

import resource
import subprocess
import sys

from teal_cli.cli import VERBS

HEAVY = ("torch", "transformers", "datasets", "triton", "numpy")


def _loaded_after(code: str) -> set[str]:
    probe = f"import sys\n{code}\nprint('LOADED', *[m for m in {HEAVY!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return set(result.stdout.rsplit("LOADED", 1)[1].split())


def test_package_imports_nothing_heavy() -> None:
    assert _loaded_after("import teal_cli") == set()


def test_help_imports_nothing_heavy() -> None:
    assert _loaded_after("from teal_cli.cli import run; assert run(['--help']) == 0") == set()


def test_verb_help_imports_nothing_heavy() -> None:
    for verb in VERBS:
        assert _loaded_after(f"from teal_cli.cli import run; assert run(['{verb}', '--help']) == 0") == set()


def test_version_and_no_arguments() -> None:
    code = "from teal_cli.cli import run; assert run(['--version']) == 0; assert run([]) == 0"
    assert _loaded_after(code) == set()


def test_a_wrong_flag_fails_before_anything_heavy() -> None:
    code = "from teal_cli.cli import run; assert run(['calibrate', '--tokens', 'many']) == 2"
    assert _loaded_after(code) == set()


def test_what_is_read_from_files_alone_needs_no_transformers() -> None:
    """Whose import is longer than all that these verbs do."""
    for verb in ("inspect", "report"):
        code = f"from teal_cli.cli import run; assert run(['{verb}', 'no folder']) == 3"
        assert "transformers" not in _loaded_after(code)


def _fastest(*arguments: str) -> float:
    """Seconds that a new interpreter has a processor, since the machine may be busy with other tests; best of five."""
    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(times)


def test_help_is_fast() -> None:
    """Under 0.4 s, or on a slow machine under twice what typer needs to show a page by itself."""
    a_page = "import typer; typer.run(lambda: None)"
    assert _fastest("-m", "teal_cli", "--help") < max(0.4, 2 * _fastest("-c", a_page, "--help"))
