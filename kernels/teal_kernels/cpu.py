"""CPU backend: the sparse product as `embedding_bag` over an input-major weight.

The transposed weight is a table with one row per input; the product is a weighted sum of the rows
of the active inputs, which is what `embedding_bag(mode="sum", per_sample_weights=...)` computes
with PyTorch's own vectorised code. No compiler is needed on the user's machine.
"""

from functools import lru_cache

import torch
from torch import Tensor

# One bag is summed by one thread; two bags a thread even out their loads. All 210 products of
# SmolLM2-135M at 50 % in float32 on two Zen cores: 22.1 ms with one bag a thread, 14.6 with two,
# 18.5 with four.
_BAGS_PER_THREAD = 2
_SUM = 0
"""The mode of `torch.embedding_bag` that adds rows."""

# In a small model the calls between two products take as long as the products, so this file counts
# calls: hardshrink drops inputs in one, and torch.embedding_bag goes without its functional wrapper.


def cpu_sparse_linear(x: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor) -> Tensor:
    """Sparse product on the CPU; arguments and result as `reference_linear`.

    Deterministic for a given thread count: bags and their order do not depend on timing.
    """
    table = weight.t()  # (in, out)
    if table.shape[1] > 1 and table.stride(1) != 1:  # a weight that nobody laid out input-major; columns of one will do
        table = table.contiguous()
    n_in, n_out = table.shape
    bound = bound_of(float(threshold), x.dtype)
    if x.numel() == n_in:
        y = _weighted_sum(table, *select_active(x.reshape(n_in), bound))
    elif x.numel() == 0:
        return x.new_empty((*x.shape[:-1], n_out))
    else:
        y = torch.stack([_weighted_sum(table, *select_active(row, bound)) for row in x.reshape(-1, n_in)])
    if bias is not None:
        y = y + bias
    return y.view(*x.shape[:-1], n_out)


@lru_cache(maxsize=4096)
def bound_of(threshold: float, dtype: torch.dtype) -> float:
    """The threshold as hardshrink must get it.

    hardshrink compares in the dtype of x. Rounding the threshold down to that dtype first leaves
    the comparison what it is in float32: no value of the dtype lies between the two.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return threshold
    rounded = torch.tensor(threshold, dtype=dtype)
    if float(rounded) > threshold:
        rounded = torch.nextafter(rounded, torch.tensor(-float("inf"), dtype=dtype))
    return float(rounded)


def select_active(x: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """(in,) -> indices (active,) int64 and values (active,) of the inputs that are kept.

    hardshrink keeps NaN, and NaN is not zero, so it propagates.
    """
    kept = torch.hardshrink(x, bound)
    index = kept.nonzero().view(-1)
    return index, kept.index_select(0, index)


@lru_cache(maxsize=4096)
def offsets_of(count: int, threads: int) -> Tensor:
    """Where each bag begins among `count` active inputs: (bags,) int64."""
    bags = min(count, _BAGS_PER_THREAD * threads)
    return torch.arange(0, count, -(-count // bags))


def _weighted_sum(table: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """(in, out) rows at `index`, weighted by `values` -> (out,)."""
    count = index.shape[0]
    if count == 0:
        return table.new_zeros(table.shape[1])
    offsets = offsets_of(count, torch.get_num_threads())
    partial = torch.embedding_bag(table, index, offsets, False, _SUM, False, values, False)[0]
    # Partial sums of 16-bit weights are added in float32: one rounding at the end, not one a bag.
    return partial.sum(0) if table.itemsize >= 4 else partial.sum(0, dtype=torch.float32).to(table.dtype)
