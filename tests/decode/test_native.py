"""The native path against transformers' forward in float64 with dropped inputs."""

import pytest
import torch
from covering import covering
from native_models import FAMILIES, NO_LIBRARY, OTHERS, check_decided_steps, check_steps, sparse, tiny, use_threads

pytestmark = pytest.mark.skipif(NO_LIBRARY is not None, reason=str(NO_LIBRARY))

LENGTHS = [[20], [20, 20], [3, 20, 11], [1, 2, 3, 4, 5], [33, 16, 15, 17, 1, 2, 31, 32], [7] * 9]


PLANS = ["alike", "apart", "output"]
QUANTISED = [family for family in FAMILIES if family != "gpt2"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@torch.no_grad()
@covering(2, family=FAMILIES, plan=PLANS, dtype=DTYPES, lengths=LENGTHS, threads=[1, 2, 3])
def test_steps(
    family: str, plan: str, dtype: torch.dtype, lengths: list[int], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_threads(monkeypatch, threads)
    check_steps(sparse(tiny(family).to(dtype), plan), lengths)


@torch.no_grad()
@covering(
    2,
    family=QUANTISED,
    plan=PLANS,
    scheme=["int8", "int4:32", "int4:64"],
    output=[False, True],
    dtype=DTYPES,
    lengths=LENGTHS,
    threads=[1, 2, 3],
)
def test_steps_of_quantised_weights(
    family: str,
    plan: str,
    scheme: str,
    output: bool,
    dtype: torch.dtype,
    lengths: list[int],
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_threads(monkeypatch, threads)
    check_decided_steps(sparse(tiny(family).to(dtype), plan, scheme, output=output), lengths)


@torch.no_grad()
@covering(2, family=OTHERS, plan=PLANS, dtype=DTYPES, lengths=[[20], [3, 20, 11], [7] * 9], threads=[1, 2, 3])
def test_steps_of_other_families(
    family: str, plan: str, dtype: torch.dtype, lengths: list[int], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_threads(monkeypatch, threads)
    check_decided_steps(sparse(tiny(family).to(dtype), plan), lengths)


@torch.no_grad()
@pytest.mark.parametrize("family", OTHERS)
@pytest.mark.parametrize(
    ("scheme", "lengths", "plan"),
    [("int8", [20], "apart"), ("int4:32", [20, 9], "alike"), ("int4:64", [7, 3], "alike")],
)
def test_steps_of_other_families_with_quantised_weights(
    family: str, scheme: str, lengths: list[int], plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_threads(monkeypatch, 2)
    check_decided_steps(sparse(tiny(family), plan, scheme), lengths)
