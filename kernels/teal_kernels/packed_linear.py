"""The sparse product of one layer with quantised weights: the definition, on a CPU, and on a GPU."""

from dataclasses import replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from teal_kernels.cpu import bound_of, offsets_of, select_active
from teal_kernels.launching import LEAST_TILE, uses_fma
from teal_kernels.operands import Scratch
from teal_kernels.packing import Packed, codes_of, dequantised
from teal_kernels.reference import masked_input
from teal_kernels.triton_gemv import MAX_ROWS, TileConfig, gemv

_ROW_END = 8
"""Bytes behind each row of a byte table: its scale and its offset, float32."""


def byte_table(packed: Packed) -> Tensor:
    """What the CPU reads: (in, out + 9) uint8, each row its codes, a one, the scale 1 and an offset.

    The offset is minus the zero point where that is the same everywhere. Else it is none, and what sums up
    the ones is the sum of x that the zero points are multiplied with.

    A byte a weight for 4 bits too: torch's sums of 4-bit rows took longer (28 against 23 microseconds
    for 288 rows of 960, two Zen cores).
    """
    n_in = packed.shape[0]
    one = torch.ones(n_in, 1, dtype=torch.uint8)
    offset = -float(1 << (packed.bits - 1)) if packed.zeros is None else 0.0
    end = torch.tensor([1.0, offset]).view(torch.uint8).expand(n_in, _ROW_END)
    return torch.cat([codes_of(packed), one, end], dim=1)


def cpu_packed_linear(x: Tensor, table: Tensor, packed: Packed, bias: Tensor | None, threshold: Tensor) -> Tensor:
    """Sparse product on the CPU, in float32 and rounded once.

    Args:
        x: (..., in).
        table: from `byte_table`.
        packed: what it was made of.
        bias: (out,) or None.
        threshold: 0-d float32.
    """
    n_in, n_out = packed.shape
    bound = bound_of(float(threshold), x.dtype)
    rows = [_row(row, table, packed, bound) for row in x.reshape(-1, n_in)]
    y = rows[0] if len(rows) == 1 else torch.stack(rows) if rows else x.new_empty(0, n_out)
    if bias is not None:
        y = y + bias
    return y.to(x.dtype).view(*x.shape[:-1], n_out)


def _row(x: Tensor, table: Tensor, packed: Packed, bound: float) -> Tensor:
    index, values = select_active(x, bound)
    count = index.shape[0]
    groups, n_out = packed.scales.shape
    if count == 0:
        return packed.scales.new_zeros(n_out, dtype=torch.float32)
    if groups == 1:
        offsets = offsets_of(count, torch.get_num_threads())
    else:  # a bag a group
        offsets = torch.searchsorted(index, _starts(groups, packed.group))
    sums = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
        table, index, offsets, False, 0, False, values.float()
    )
    if groups == 1:
        sums = sums.sum(0, keepdim=True)
    products = sums[:, :n_out]
    if packed.zeros is not None:
        products = products - sums[:, n_out:] * packed.zeros
    y: Tensor = products[0] * packed.scales[0] if groups == 1 else (products * packed.scales).sum(0)
    return y


@lru_cache(maxsize=64)
def _starts(groups: int, group: int) -> Tensor:
    return torch.arange(groups) * group


def fitting(config: TileConfig, table: Tensor | Packed, rows: int) -> TileConfig:
    """The tile config, as the groups of quantised weights and a batch of so many rows allow it; of others as it is."""
    if not isinstance(table, Packed):
        return config
    splits, group, n_in = config.inputs_per_chunk, table.group, table.words.shape[0]
    if group < n_in and splits > group and (splits % group or group % 32):
        splits = group
    elif splits < group < n_in and group % splits:
        splits = min(group, 32)
    least = 32 // table.bits * (1 if uses_fma(rows, table.bits) else LEAST_TILE)  # tensor cores take tiles of words
    return replace(config, inputs_per_chunk=splits, block_out=max(config.block_out, least))


def reference_packed_linear(x: Tensor, packed: Packed, bias: Tensor | None, threshold: Tensor) -> Tensor:
    """Masked input times the dequantised weights: the meaning of the other two."""
    return F.linear(masked_input(x, threshold), dequantised(packed, x.dtype).t(), bias)


def triton_packed_linear(
    x: Tensor, packed: Packed, bias: Tensor | None, threshold: Tensor, config: TileConfig
) -> Tensor:
    """Sparse product on a GPU (or in the interpreter)."""
    n_in, n_out = packed.shape
    rows = x.reshape(-1, n_in).contiguous()
    y = rows.new_empty(rows.shape[0], n_out)
    # A layer's part of a table of several: its scales lie apart, and the kernel wants them in one piece.
    zeros = None if packed.zeros is None else packed.zeros.contiguous()
    packed = replace(packed, scales=packed.scales.contiguous(), zeros=zeros)
    scratch = Scratch(x.device)
    for first in range(0, rows.shape[0], MAX_ROWS):
        part, out = rows[first : first + MAX_ROWS], y[first : first + MAX_ROWS]
        gemv(
            part,
            packed,
            packed.parts,
            threshold.view(1),
            out,
            fitting(config, packed, part.shape[0]),
            scratch,
            bias=bias,
            exclusive_device=False,
        )
    return y.view(*x.shape[:-1], n_out)
