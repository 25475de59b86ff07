"""How a GPU holds the inputs of a program, for the interpreter."""

import pytest

from teal_kernels import triton_gemv


@pytest.fixture
def narrow_warps(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where a warp is narrower than a stretch and does not hold all of its lines."""
    monkeypatch.setattr(triton_gemv, "_lanes", lambda _: 8)
