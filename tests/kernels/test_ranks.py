"""Sums and gathers over ranks, in one process: the words of the other ranks are in the inbox before."""

import pytest
import torch
from torch import Tensor

from teal_kernels.launching import EMPTY
from teal_kernels.triton_ranks import Inboxes, gather_ranks, places_of_sum, squares_of_sum, sum_ranks

BASE = 5


def inboxes_of(rank: int, parts: list[Tensor], places: int) -> Inboxes:
    """Those of all ranks; into the one of `rank` the others have sent their parts."""
    words = [torch.full((places,), EMPTY, dtype=torch.int32) for _ in parts]
    size = parts[0].numel()
    for source, part in enumerate(parts):
        if source != rank:
            words[rank][BASE + source * size :][:size] = part.float().flatten().view(torch.int32)
    return Inboxes(rank, words, most_looks=3)


def parts_of(ranks: int, rows: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(ranks * size + rows)
    return [torch.randn(rows, size, generator=generator).to(dtype) for _ in range(ranks)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)  # bfloat16 is rounded otherwise here
@pytest.mark.parametrize(("ranks", "rows", "size"), [(2, 1, 300), (3, 2, 256), (1, 1, 70)])
def test_all_ranks_have_the_same_sum(ranks: int, rows: int, size: int, dtype: torch.dtype) -> None:
    parts = parts_of(ranks, rows, size, dtype)
    stream = torch.randn(rows, size, generator=torch.Generator().manual_seed(9)).to(dtype)
    places = BASE + places_of_sum(ranks, rows, size)
    total = torch.zeros(rows, size)
    for part in parts:  # in this order, in float32
        total += part.float()
    expected = (stream.float() + (total.to(dtype).float() * 0.5).to(dtype).float()).to(dtype)
    for rank in range(ranks):
        inboxes = inboxes_of(rank, parts, places)
        y, squares = stream.clone(), torch.full((2, rows, squares_of_sum(size)), 7.0)
        sum_ranks(parts[rank], inboxes, BASE, y, added=True, scale=0.5, squares=squares)
        assert torch.equal(y, expected)
        torch.testing.assert_close(squares[0].sum(1), y.float().square().sum(1))
        torch.testing.assert_close(squares[1].sum(1), y.float().sum(1), atol=1e-3, rtol=1e-4)
        assert bool((inboxes.words[rank] == EMPTY).all()), "places that were read are not empty"
        for other in set(range(ranks)) - {rank}:
            sent = inboxes.words[other][BASE + rank * rows * size :][: rows * size]
            assert torch.equal(sent.view(torch.float32), parts[rank].float().flatten())


def test_a_sum_that_is_written() -> None:
    parts = parts_of(2, 1, 300, torch.float32)
    y = torch.full((1, 300), 5.0)
    sum_ranks(parts[1], inboxes_of(1, parts, 2000), BASE, y, added=False)
    assert torch.equal(y, parts[0] + parts[1])


@pytest.mark.parametrize(("ranks", "rows", "width", "size"), [(2, 1, 40, 80), (3, 2, 30, 77), (2, 1, 600, 1199)])
def test_gathered_columns_stand_in_the_order_of_ranks(ranks: int, rows: int, width: int, size: int) -> None:
    parts = parts_of(ranks, rows, width, torch.bfloat16)
    for rank in range(ranks):
        inboxes = inboxes_of(rank, parts, BASE + places_of_sum(ranks, rows, width))
        y = torch.zeros(rows, size, dtype=torch.bfloat16)
        gather_ranks(parts[rank], inboxes, BASE, y)
        assert torch.equal(y, torch.cat(parts, dim=1)[:, :size])
        assert bool((inboxes.words[rank] == EMPTY).all())


def test_a_rank_that_sends_nothing_is_waited_for_only_so_long() -> None:
    """On a GPU the launch then fails; the interpreter goes on."""
    parts = parts_of(2, 1, 64, torch.float32)
    inboxes = Inboxes(0, [torch.full((200,), EMPTY, dtype=torch.int32) for _ in parts], most_looks=2)
    y = torch.zeros(1, 64)
    sum_ranks(parts[0], inboxes, 0, y, added=False)
    assert not torch.equal(y, parts[0])
