"""SmolLM2-135M, whose nine heads two processes divide as six and three, against one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.real


def written(runs: Path, *more: str) -> str:
    """A dense greedy reply in float32. (Sparse ones part: the sums of two are rounded otherwise than those of one, and
    an input beside its threshold may fall on the other side.)"""
    asked = ["--runs", str(runs), "--device", "cpu", "--dtype", "float32", "--backend", "reference", "--sparsity", "0"]
    asked += ["--compile", "never"]
    done = subprocess.run(
        [sys.executable, "-m", "teal_cli", "generate", *asked, "--prompt", "Why is the sky blue?", *more],
        env={**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.usefixtures("smollm2")
def test_two_processes_write_what_one_writes(tmp_path: Path) -> None:
    one = written(tmp_path, "--max-new-tokens", "24")
    assert len(one) > 60
    assert written(tmp_path, "--max-new-tokens", "24", "--tensor-parallel", "2") == one
