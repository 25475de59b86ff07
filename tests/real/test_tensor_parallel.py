"""SmolLM2-135M, whose nine heads two processes divide as six and three, against one process."""

from pathlib import Path

import pytest
from warm import environment, warm

pytestmark = pytest.mark.real


def written(runs: Path, *more: str) -> str:
    """A dense greedy reply in float32. (Sparse ones part: the sums of two are rounded otherwise than those of one, and
    an input beside its threshold may fall on the other side.)"""
    asked = ["--runs", str(runs), "--device", "cpu", "--dtype", "float32", "--backend", "reference", "--sparsity", "0"]
    asked += ["--compile", "never"]
    done = warm().run(["generate", *asked, "--prompt", "Why is the sky blue?", *more], env=environment())
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.usefixtures("smollm2")
def test_two_processes_write_what_one_writes(tmp_path: Path) -> None:
    one = written(tmp_path, "--max-new-tokens", "24")
    assert len(one) > 60
    assert written(tmp_path, "--max-new-tokens", "24", "--tensor-parallel", "2") == one
