"""Every kernel compiles for GPUs that are not here: the interpreter takes what the compiler refuses."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import teal_kernels

TESTS = Path(__file__).parents[1]


def _kernels() -> set[str]:
    """Names of the functions that are launched, by their suffix."""
    sources = Path(teal_kernels.__file__).parent.glob("jit_*.py")
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sources]
    names = {node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}
    return {name for name in names if name.endswith("_kernel")}


@pytest.mark.parametrize("capability", ["80", "90"])
def test_every_kernel_compiles(capability: str, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, str(TESTS / "compile_kernels.py"), capability],
        env=environment | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]), "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert set(result.stdout.split()) == _kernels()
    assert "Warning" not in result.stderr
