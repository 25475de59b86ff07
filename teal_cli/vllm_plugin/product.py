"""The product of a layer that vLLM runs: one row skips inputs, several are multiplied whole.

A layer of vLLM may be several projections (q, k and v; gate and up), which lie side by side in its weight. Each has a
threshold of its own. Knows nothing of vLLM, which registers these functions as ops: so compiled code and CUDA graphs
take the branch for the rows that they run with.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from teal_kernels import KEEP_ALL, reference_linear
from teal_kernels.cpu import cpu_sparse_linear
from teal_kernels.native import library
from teal_kernels.native.structures import Weight, weight_of
from teal_kernels.operands import Scratch
from teal_kernels.ops import BackendUnavailableError
from teal_kernels.plan_gemv import TileConfig
from teal_kernels.support import kernels_unsupported_reason
from teal_kernels.triton_gemv import gemv
from teal_kernels.tuning import choose_config

MOST_PARTS = 3
"""Projections of one layer, which the GPU kernel takes."""


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None, thresholds: Tensor, parts: list[int], sparsity: float
) -> Tensor:
    """Multiply what a layer is given.

    Args:
        x: (..., in); all leading indices are rows.
        weight: (out, in), input-major, the dtype of x.
        bias: (out,) or None.
        thresholds: (parts,) float32 on x's device: of one row, inputs with |x| <= threshold are skipped.
        parts: outputs of each projection.
        sparsity: expected of one row, weighted by outputs. On a GPU nothing is skipped where that does not pay.

    Returns:
        (..., out), the dtype of x.
    """
    if x.numel() != x.shape[-1]:
        # A CPU without instructions for 16 bits takes longer for an input-major weight than for a copy of it and that.
        copied = x.device.type == "cpu" and x.dtype != torch.float32
        return F.linear(x, weight.contiguous() if copied else weight, bias)
    if x.is_cuda and skips_nothing_because(x.device, x.dtype) is None:
        return _on_gpu(x, weight, bias, thresholds, tuple(parts), sparsity)
    if x.device.type == "cpu" and (native := _native(torch.get_num_threads())) is not None:
        return _on_cpu(native, x, weight, bias, thresholds, tuple(parts))
    multiply = cpu_sparse_linear if x.device.type == "cpu" else reference_linear
    biases = [None] * len(parts) if bias is None else bias.split(parts)
    each = zip(weight.split(parts), biases, thresholds.unbind(), strict=True)
    found = [multiply(x, part, of_part, threshold) for part, of_part, threshold in each]
    return found[0] if len(found) == 1 else torch.cat(found, dim=-1)


def product_shape(
    x: Tensor, weight: Tensor, bias: Tensor | None, thresholds: Tensor, parts: list[int], sparsity: float
) -> Tensor:
    """What `product` returns, without its numbers: for compilers."""
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def note_rows(x: Tensor, thresholds: Tensor, threshold: float) -> None:
    """Set the threshold of another layer for the pass under way: several rows skip nothing.

    Args:
        x: (..., in) of a layer that sees all rows.
        thresholds: (1,) float32, written.
        threshold: of one row.
    """
    thresholds.fill_(threshold if x.numel() == x.shape[-1] else KEEP_ALL)


def prepare(weight: Tensor, parts: list[int], sparsity: float) -> None:
    """Compile the kernel of a weight on a GPU and make its scratch memory, before anything is captured."""
    if weight.is_cuda:
        _scratches.setdefault(_sizes(weight, tuple(parts)), Scratch(weight.device))
        thresholds = torch.zeros(len(parts), dtype=torch.float32, device=weight.device)
        product(weight.new_zeros(1, weight.shape[1]), weight, None, thresholds, parts, sparsity)


@lru_cache
def skips_nothing_because(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why all weights are read here, though inputs are dropped; None where they are skipped."""
    return None if device.type == "cpu" else kernels_unsupported_reason(device, dtype)


@lru_cache
def _native(threads: int) -> library.Linear | None:
    """The native library in PyTorch's threads; None where that cannot be.

    Raises:
        BackendUnavailableError: TEAL_NATIVE names a variant that cannot run here.
    """
    if library.load() is None:
        return None
    try:
        return library.Linear(library.BorrowedPool(threads))
    except BackendUnavailableError:  # several threads, which PyTorch has from elsewhere
        return None


def _on_cpu(
    native: library.Linear, x: Tensor, weight: Tensor, bias: Tensor | None, thresholds: Tensor, parts: tuple[int, ...]
) -> Tensor:
    row = x.reshape(1, -1).float()
    y = row.new_empty(1, weight.shape[0])
    columns = [y] if len(parts) == 1 else y.split(parts, dim=1)
    for structure, threshold, of_part in zip(_structures_of(weight, parts), thresholds.tolist(), columns, strict=True):
        structure.threshold = threshold
        native(structure, row, of_part)
    if bias is not None:
        y += bias
    return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


_structures: dict[tuple[object, ...], list[Weight]] = {}
"""Made once for each place in memory: they say what lies there, and do not keep it."""


def _structures_of(weight: Tensor, parts: tuple[int, ...]) -> list[Weight]:
    place = weight.data_ptr(), weight.dtype, weight.shape[1], weight.stride(), parts
    if (found := _structures.get(place)) is None:
        found = _structures[place] = [weight_of(part) for part in weight.split(parts)]
        for structure in found:
            structure.holds = ()
    return found


def _on_gpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, thresholds: Tensor, parts: tuple[int, ...], sparsity: float
) -> Tensor:
    config = _config(x.device, weight.shape[1], parts, x.dtype, sparsity)
    if config.dense:
        return F.linear(x, weight, bias)
    y = x.new_empty(1, weight.shape[0])
    scratch = _scratches.get(_sizes(weight, parts)) or Scratch(x.device)
    row = x.reshape(1, -1)
    gemv(row, weight.t(), parts, thresholds, y, config, scratch, bias=bias, exclusive_device=False)
    return y.view(*x.shape[:-1], weight.shape[0])


@lru_cache(maxsize=1024)
def _config(
    device: torch.device, inputs: int, parts: tuple[int, ...], dtype: torch.dtype, sparsity: float
) -> TileConfig:
    return choose_config(device, inputs=inputs, parts=parts, dtype=dtype, rows=1, epilogue="plain", sparsity=sparsity)


_Sizes = tuple[torch.device, torch.dtype, int, tuple[int, ...]]
_scratches: dict[_Sizes, Scratch] = {}
"""Layers of the same sizes share scratch memory: they run one after the other."""


def _sizes(weight: Tensor, parts: tuple[int, ...]) -> _Sizes:
    return weight.device, weight.dtype, weight.shape[1], parts
