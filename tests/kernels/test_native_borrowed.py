"""The native library's products in PyTorch's threads."""

import pytest
import torch

from teal_kernels import input_major
from teal_kernels.native import library, structures
from teal_kernels.ops import BackendUnavailableError

pytestmark = pytest.mark.skipif(library.load() is None, reason="the native library is not built")


@pytest.mark.parametrize("threads", [1, 3])
def test_products(threads: int) -> None:
    torch.manual_seed(threads)
    weight, x, y = torch.randn(70, 33), torch.randn(3, 33), torch.empty(3, 70)
    with library.BorrowedPool(threads) as pool:
        multiply = library.Linear(pool)
        multiply(structures.weight_of(input_major(weight), threshold=0.5), x, y)
        # 33 products of normal numbers, added in any order.
        torch.testing.assert_close(y, x.where(x.abs() > 0.5, 0) @ weight.t(), rtol=0, atol=2e-5)
        with pytest.raises(ValueError, match=r"not contiguous torch.float32 \(3, 70\)"):
            multiply(structures.weight_of(weight), x, torch.empty(70, 3).t())


def test_no_session_runs_on_them() -> None:
    table, norm = torch.randn(24, 16), structures.norm_of(torch.ones(16), 1e-5)
    output = structures.product_of([structures.weight_of(table)], structures.Epilogue.PLAIN)
    program = structures.program_of([norm], embedding=structures.weight_of(table), norm=norm, output=output)
    with library.BorrowedPool(2) as pool, pytest.raises(ValueError, match="borrowed threads"):
        library.Session(program, pool)


def test_an_openmp_that_lends_no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.ctypes, "CDLL", lambda name: object())
    with pytest.raises(BackendUnavailableError, match="no OpenMP has GOMP_parallel"):
        library.BorrowedPool(2)
