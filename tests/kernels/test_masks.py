"""Masked hidden states by the kernel, against PyTorch's own."""

import pytest
import torch
from torch import Tensor

from teal_kernels import active_inputs
from teal_kernels.triton_masks import is_worth_it, masked_rows

SHAPES = [(3, 7, 65), (2, 4, 4096), (1, 1, 1)]
STARTS = {"none": 0, "some": 3, "all": 100, "rows": None}


def _random(shape: tuple[int, int, int]) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(shape[1]))
    x.view(-1)[:: max(1, x.numel() // 5)] = 0.0
    return x


def _stays(shape: tuple[int, int, int], start: Tensor | int, offset: int) -> Tensor:
    positions = torch.arange(offset, offset + shape[1])
    first = start if isinstance(start, Tensor) else torch.full((shape[0],), start)
    return (positions < first[:, None]).unsqueeze(-1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("starts", STARTS)
@pytest.mark.parametrize("threshold", [0.7, 0.0, -1.0])
@pytest.mark.parametrize("offset", [0, 2])
def test_values_counts_and_gradients(shape: tuple[int, int, int], starts: str, threshold: float, offset: int) -> None:
    x = _random(shape).requires_grad_()
    start: Tensor | int = STARTS[starts] if starts != "rows" else torch.arange(shape[0]) * 3
    limit = torch.tensor(threshold)
    kept = active_inputs(x.detach(), limit) | _stays(shape, start, offset)
    masked, dropped = masked_rows(x, limit, start, tokens=shape[1], offset=offset)
    assert torch.equal(masked, x.detach() * kept)
    assert int(dropped) == int((~kept).sum())
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(masked, x, upstream, retain_graph=True)
    inside = kept & ((x.detach() != 0) | _stays(shape, start, offset) | (threshold < 0))
    assert torch.equal(gradient, upstream * inside)
    assert torch.equal(inside, kept)  # no input is kept that is 0, where a threshold could drop it


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    """A hidden state in float32 under autocast, and one that has 16 bits itself, without a dimension for its rows."""
    x, limit = _random((2, 5, 33)).requires_grad_(), torch.tensor(0.5)
    masked, _ = masked_rows(x, limit, 2, tokens=5, dtype=dtype)
    rounded = masked_rows(x.detach(), torch.tensor(-1.0), 0, tokens=5, dtype=dtype)[0]
    torch.testing.assert_close(rounded, x.detach().to(dtype), rtol=2**-7, atol=0)  # the interpreter cuts off
    kept = active_inputs(rounded, limit) | _stays((2, 5, 33), 2, 0)
    assert torch.equal(masked, rounded * kept)
    (gradient,) = torch.autograd.grad(masked.sum(), x)
    assert gradient.dtype == torch.float32
    assert torch.equal(gradient, (kept & ((rounded != 0) | _stays((2, 5, 33), 2, 0))).float())
    flat = x.detach().to(dtype).flatten(0, 1)
    again, dropped = masked_rows(flat, limit, 2, tokens=5)
    kept = active_inputs(flat, limit) | _stays((2, 5, 33), 2, 0).flatten(0, 1)
    assert torch.equal(again, flat * kept)
    assert int(dropped) == int((~kept).sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_was_masked_stays_as_it_is(dtype: torch.dtype) -> None:
    """An adapter and the layer beside it read the same, though the layer masks once more what it is given."""
    limit, above = torch.tensor(0.5), 0.5 * (1 + 2.0**-14)  # which is 0.5 in 16 bits
    x = torch.tensor([0.25, 0.5, above, 0.75, 1e-9, 3.0]).view(1, 1, 6).requires_grad_()
    masked, dropped = masked_rows(x, limit, 0, tokens=1, dtype=dtype)
    again, more = masked_rows(masked, limit, 0, tokens=1, dtype=dtype)
    assert torch.equal(again, masked)
    assert int(dropped) == int(more) == 4
    kept, _ = masked_rows(x, torch.tensor(0.0), 0, tokens=1, dtype=dtype)
    (gradient,) = torch.autograd.grad(kept.sum(), x)
    assert torch.equal(gradient != 0, kept != 0)


def test_gradients_go_straight_through() -> None:
    x = _random((2, 3, 8)).requires_grad_()
    masked, _ = masked_rows(x, torch.tensor(0.5), 0, tokens=3, dtype=torch.bfloat16, straight_through=True)
    upstream = torch.randn(2, 3, 8).bfloat16()
    (gradient,) = torch.autograd.grad(masked, x, upstream)
    assert torch.equal(gradient, upstream.float())


def test_what_is_not_contiguous_and_no_number() -> None:
    x = _random((2, 6, 8)).transpose(0, 1)
    x[1, 1, 3] = float("nan")
    masked, dropped = masked_rows(x, torch.tensor(0.5), 0, tokens=2)
    kept = active_inputs(x, torch.tensor(0.5))
    assert torch.equal(masked.nan_to_num(7.0), (x * kept).nan_to_num(7.0))
    assert int(dropped) == int((~kept).sum())


def test_a_cpu_keeps_its_own_way() -> None:
    assert not is_worth_it(torch.zeros(2, 3))
