"""Mixtures of experts on the native path, against transformers' forward in float64 with dropped inputs."""

import pytest
import torch
from covering import covering
from native_models import MIXTURES, NO_LIBRARY, check_decided_steps, sparse, tiny, use_threads

pytestmark = pytest.mark.skipif(NO_LIBRARY is not None, reason=str(NO_LIBRARY))

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = [[20], [3, 20], [3, 20, 11], [5, 1, 9, 20], [1, 6, 3, 4, 5], [7] * 9]


@torch.no_grad()
@pytest.mark.parametrize("family", MIXTURES)
@covering(2, plan=["alike", "apart", "output"], dtype=DTYPES, lengths=LENGTHS, threads=[1, 2, 3])
def test_steps(
    family: str, plan: str, dtype: torch.dtype, lengths: list[int], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_threads(monkeypatch, threads)
    check_decided_steps(sparse(tiny(family).to(dtype), plan), lengths)
