"""Every kernel compiles for GPUs that are not here: the interpreter takes what the compiler refuses."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import teal_kernels

TESTS = Path(__file__).parents[1]
CAPABILITIES = ["80", "90"]


def _kernels() -> set[str]:
    """Names of the functions that are launched, by their suffix."""
    sources = Path(teal_kernels.__file__).parent.glob("jit_*.py")
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sources]
    names = {node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}
    return {name for name in names if name.endswith("_kernel")}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> "subprocess.CompletedProcess[str]":
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    own = {
        "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]),
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
    }
    command = [sys.executable, str(TESTS / "compile_kernels.py"), *CAPABILITIES]
    return subprocess.run(command, env=environment | own, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_compiles(capability: str, compiled: "subprocess.CompletedProcess[str]") -> None:
    assert compiled.returncode == 0, compiled.stderr
    names = {words[0]: set(words[1:]) for words in map(str.split, compiled.stdout.splitlines())}
    assert names[capability] == _kernels()
    assert "Warning" not in compiled.stderr
