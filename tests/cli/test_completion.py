"""What a shell offers at a tab, asked as bash, zsh and fish ask; and that it costs no heavy import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_light import HEAVY

_PROBE = (
    "import sys\n"
    "from teal_cli.cli import run\n"
    "try:\n    run([])\n"
    f"finally:\n    print('LOADED', *[m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
)


def _asked(**environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", _PROBE], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    assert result.stderr.split() == ["LOADED"]
    return result.stdout


def _bash(line: str) -> list[str]:
    """What bash is offered at the end of a line."""
    words = line.split(" ")
    environment = {"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)}
    return _asked(_TEAL_COMPLETE="complete_bash", **environment).split()


def test_verbs_and_flags() -> None:
    assert _bash("teal ca") == ["calibrate"]
    assert set(_bash("teal ")) >= {"calibrate", "export", "import", "info", "run"}
    assert "--sensitivity-tokens" in _bash("teal calibrate --s")
    assert "--debug" in _bash("teal --d")


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("teal generate --model llama-3-", ["llama-3-70b", "llama-3-8b"]),
        ("teal info --model llama-2-1", ["llama-2-13b"]),
        ("teal export --allocation fi", ["fisher", "fisher-site"]),
        ("teal eval --allocation uniform,gr", ["uniform,greedy"]),
        ("teal calibrate --dataset s", ["sotu", "self"]),
        ("teal calibrate --dtype b", ["bfloat16"]),
        ("teal bench --quantise int4", ["int4", "int4:32", "int4:64"]),
        ("teal bench --backend tr", ["triton"]),
        ("teal run llama", ["llama-3-70b", "llama-3-8b"]),
        ("teal export --out so", []),  # a folder: the shell's own business
    ],
)
def test_values(line: str, offered: list[str]) -> None:
    assert _bash(line) == offered


def test_own_files_are_offered() -> None:
    """Aliases of one's own, exports, allocation files."""
    export = "runs/mine/greedy-0.50"
    for path in (f"{export}/teal.json", f"{export}/allocation.yaml", "configs/models/mine.yaml"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("")
    Path("runs/mine/lookup-0.50.yaml").write_text("")
    Path("edited.yaml").write_text("")
    assert _bash("teal generate --model mi") == ["mine", "minitron-4b", "mistral-7b", "mixtral-8x7b"]
    assert _bash("teal generate --model ru") == ["runs/mine/greedy-0.50"]
    assert _bash("teal export --allocation ed") == ["edited.yaml"]
    assert _bash("teal export --allocation runs") == [
        "runs/mine/greedy-0.50/allocation.yaml",
        "runs/mine/lookup-0.50.yaml",
    ]


def test_other_shells() -> None:
    typed = {"_TYPER_COMPLETE_ARGS": "teal generate --model llama-3-"}
    assert '"llama-3-8b"' in _asked(_TEAL_COMPLETE="complete_zsh", **typed)
    assert (
        "llama-3-8b" in _asked(_TEAL_COMPLETE="complete_fish", _TYPER_COMPLETE_FISH_ACTION="get-args", **typed).split()
    )


def test_the_script_is_for_teal_and_bash_takes_it(tmp_path: Path) -> None:
    environment = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = [sys.executable, "-m", "teal_cli", "--show-completion", "bash"]
    script = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert "complete -o default -F _teal_completion teal" in script
    (tmp_path / "teal").write_text(f'#!/bin/sh\nexec {sys.executable} -m teal_cli "$@"\n')
    (tmp_path / "teal").chmod(0o755)
    ask = 'COMP_WORDS=(teal export --allocation fi); COMP_CWORD=3; _teal_completion teal; echo "${COMPREPLY[@]}"'
    environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    asked = ["bash", "-c", f"{script}\n{ask}"]
    result = subprocess.run(asked, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["fisher", "fisher-site"]
