"""The sparse product of one layer with quantised weights: the definition, on a CPU, and on a GPU."""

from dataclasses import replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from teal_kernels.cpu import cut_of, offsets_of, select_active
from teal_kernels.launching import LEAST_TILE
from teal_kernels.packing import Packed, codes_of, dequantised
from teal_kernels.reference import masked_input
from teal_kernels.triton_gemv import MAX_ROWS, GemvConfig, Scratch, gemv

_OFFSET = 128.0
_ROW_END = 8
"""Bytes behind each row of a byte table: its scale and its offset, float32."""


def byte_table(packed: Packed) -> Tensor:
    """What the CPU reads: (in, out + 8) uint8, code - zero + 128, each row with the scale 1 and the offset -128.

    A byte a weight for 4 bits too: torch's sums of 4-bit rows took longer (28 against 23 microseconds
    for 288 rows of 960, two Zen cores).

    Raises:
        ValueError: 8 bits with zero points, which no scheme of ours makes.
    """
    if packed.bits == 8 and packed.zeros is not None:
        raise ValueError("8 bits with zero points need more than a byte a weight on the CPU")
    n_in, n_out = packed.shape
    groups = packed.scales.shape[0]
    codes = F.pad(codes_of(packed), (0, 0, 0, groups * packed.group - n_in)).view(groups, packed.group, n_out)
    zero = torch.tensor(1 << (packed.bits - 1)) if packed.zeros is None else packed.zeros[:, None]
    centred = (codes.to(torch.int16) - zero + int(_OFFSET)).to(torch.uint8).view(-1, n_out)[:n_in]
    end = torch.tensor([1.0, -_OFFSET]).view(torch.uint8).expand(n_in, _ROW_END)
    return torch.cat([centred, end], dim=1)


def cpu_packed_linear(
    x: Tensor, table: Tensor, scales: Tensor, group: int, bias: Tensor | None, threshold: Tensor
) -> Tensor:
    """Sparse product on the CPU, in float32 and rounded once.

    Args:
        x: (..., in).
        table: from `byte_table`.
        scales: (groups, out).
        group: inputs that share a scale.
        bias: (out,) or None.
        threshold: 0-d float32.
    """
    n_in, n_out = table.shape[0], table.shape[1] - _ROW_END
    cut = cut_of(float(threshold), x.dtype)
    rows = [_row(row, table, scales, group, cut) for row in x.reshape(-1, n_in)]
    y = rows[0] if len(rows) == 1 else torch.stack(rows) if rows else x.new_empty(0, n_out)
    if bias is not None:
        y = y + bias
    return y.to(x.dtype).view(*x.shape[:-1], n_out)


def _row(x: Tensor, table: Tensor, scales: Tensor, group: int, cut: float) -> Tensor:
    index, values = select_active(x, cut)
    count = index.shape[0]
    if count == 0:
        return scales.new_zeros(scales.shape[1], dtype=torch.float32)
    groups = scales.shape[0]
    if groups == 1:
        offsets = offsets_of(count, torch.get_num_threads())
    else:  # a bag a group
        offsets = torch.searchsorted(index, _starts(groups, group))
    sums = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
        table, index, offsets, False, 0, False, values.float()
    )
    y: Tensor = sums.sum(0) * scales[0] if groups == 1 else (sums * scales).sum(0)
    return y


@lru_cache(maxsize=64)
def _starts(groups: int, group: int) -> Tensor:
    return torch.arange(groups) * group


def fitting(config: GemvConfig, packed: Packed, rows: int) -> GemvConfig:
    """The cut, as the groups of these weights and a batch of so many rows allow it."""
    splits, group, n_in = config.inputs_per_split, packed.group, packed.words.shape[0]
    if group < n_in and splits > group and (splits % group or group % 32):
        splits = group
    elif splits < group < n_in and group % splits:
        splits = min(group, 32)
    least = 32 // packed.bits * (LEAST_TILE if rows > 1 else 1)  # matrix units take tiles of words
    return replace(config, inputs_per_split=splits, block_out=max(config.block_out, least))


def reference_packed_linear(x: Tensor, packed: Packed, bias: Tensor | None, threshold: Tensor) -> Tensor:
    """Masked input times the dequantised weights: the meaning of the other two."""
    return F.linear(masked_input(x, threshold), dequantised(packed, x.dtype).t(), bias)


def triton_packed_linear(
    x: Tensor, packed: Packed, bias: Tensor | None, threshold: Tensor, config: GemvConfig
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
            alone=False,
        )
    return y.view(*x.shape[:-1], n_out)
