"""Quantised weights as the kernels read them: codes in 32-bit words, input-major, with scales and zero points.

A weight is (code - zero) * scale, its code of 4 or 8 bits. Scales and zero points are shared by
`group` inputs of one output, as GPTQ and AWQ checkpoints have them: then a program that reads a few
inputs multiplies with the scale once, after it has added up codes.
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """Weights of one projection, or of several side by side."""

    words: Tensor
    """(in, words) int32: 32 / `bits` outputs a word, the first in the lowest bits. Each projection begins a
    word, and its last one may be padded with zeros."""
    scales: Tensor
    """(groups, out), floating."""
    zeros: Tensor | None
    """(groups, out), of any dtype; None is 2**(bits - 1) everywhere."""
    bits: int
    group: int
    """Inputs that share a scale; the last group may be shorter."""
    parts: tuple[int, ...]
    """Outputs of each projection."""

    @property
    def shape(self) -> tuple[int, int]:
        """(in, out)."""
        return self.words.shape[0], sum(self.parts)

    @property
    def device(self) -> torch.device:
        """Of the words."""
        return self.words.device

    @property
    def nbytes(self) -> int:
        """Of codes, scales and zero points."""
        return self.words.nbytes + self.fixed_bytes

    @property
    def fixed_bytes(self) -> int:
        """Scales and zero points, which are read whatever is dropped."""
        return self.scales.nbytes + (0 if self.zeros is None else self.zeros.nbytes)


def bits_of(table: Tensor | Packed) -> int:
    """Of a weight: of its code where weights are quantised."""
    return table.bits if isinstance(table, Packed) else 8 * table.itemsize


def pack(codes: Tensor, scales: Tensor, zeros: Tensor | None, *, bits: int, group: int) -> Packed:
    """Pack one projection.

    Args:
        codes: (in, out) uint8, below 2**bits.
        scales: (groups, out) floating.
        zeros: (groups, out), or None for 2**(bits - 1).
        bits: 4 or 8.
        group: inputs that share a scale.

    Raises:
        ValueError: shapes or bits that do not fit.
    """
    if bits not in (4, 8):
        raise ValueError(f"weights of {bits} bits cannot be packed, only of 4 or 8")
    n_in, n_out = codes.shape
    groups = -(-n_in // group)
    for name, table in (("scales", scales), ("zeros", zeros)):
        if table is not None and table.shape != (groups, n_out):
            raise ValueError(f"{name} of shape {tuple(table.shape)} do not fit {groups} groups of {n_out} outputs")
    per_word = 32 // bits
    lanes = F.pad(codes, (0, -n_out % per_word)).view(n_in, -1, per_word).to(torch.int64)
    shifts = torch.arange(0, 32, bits, device=codes.device)
    # Distinct bits: their sum is their union. From 64 bits to the same low 32, as a signed word.
    words = (lanes << shifts).sum(-1)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    return Packed(words.contiguous(), scales.contiguous(), zeros, bits, group, (n_out,))


def side_by_side(packed: list[Packed]) -> Packed:
    """Projections that read one hidden state, as one table.

    Raises:
        ValueError: they differ in bits, group or kind of zero points.
    """
    first = packed[0]
    if any((p.bits, p.group, p.zeros is None) != (first.bits, first.group, first.zeros is None) for p in packed):
        raise ValueError("projections quantised in different ways cannot lie side by side")
    zeros = None if first.zeros is None else torch.cat([p.zeros for p in packed if p.zeros is not None], dim=1)
    return Packed(
        torch.cat([p.words for p in packed], dim=1),
        torch.cat([p.scales for p in packed], dim=1),
        zeros,
        first.bits,
        first.group,
        tuple(part for p in packed for part in p.parts),
    )


def codes_of(packed: Packed) -> Tensor:
    """(in, out) uint8: the codes again."""
    per_word = 32 // packed.bits
    if packed.bits == 8:
        lanes = packed.words.contiguous().view(torch.uint8)  # little-endian: the lowest bits first
    else:
        low_high = packed.words.contiguous().view(torch.uint8)
        lanes = torch.stack([low_high & 15, low_high >> 4], dim=-1).flatten(1)
    starts = [0, *accumulate(-(-part // per_word) * per_word for part in packed.parts)]
    return torch.cat(
        [lanes[:, start : start + part] for (start, _), part in zip(pairwise(starts), packed.parts, strict=True)], dim=1
    )


def dequantised(packed: Packed, dtype: torch.dtype) -> Tensor:
    """(in, out): (code - zero) * scale, in float32 and rounded once."""
    n_in, n_out = packed.shape
    groups = packed.scales.shape[0]
    codes = F.pad(codes_of(packed), (0, 0, 0, groups * packed.group - n_in)).view(groups, packed.group, n_out).float()
    codes -= 1 << (packed.bits - 1) if packed.zeros is None else packed.zeros[:, None].float()
    return codes.mul_(packed.scales[:, None].float()).view(-1, n_out)[:n_in].to(dtype)
