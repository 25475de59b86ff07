"""Round to nearest, with the range of each group chosen for the least squared error of its weights."""

import torch
from torch import Tensor

from teal_cli.quantise.scheme import Scheme
from teal_kernels.packing import Packed, pack

_RANGES = torch.linspace(1.0, 0.7, 13).tolist()
"""Shares of a group's range that are tried. The whole range first: it wins a draw."""


@torch.no_grad()
def quantise(weight: Tensor, scheme: Scheme) -> Packed:
    """Quantise one projection.

    Args:
        weight: (out, in), floating, on any device.
        scheme: bits and groups.

    Returns:
        Codes, scales (float16 for groups, float32 for whole outputs) and, for 4 bits, zero points.
    """
    n_out, n_in = weight.shape
    group = scheme.group_of(n_in)
    groups = -(-n_in // group)
    # (groups, group, out); what pads the last group is a copy of its last input, and changes no range.
    table = weight.detach().t().float()
    if groups * group > n_in:
        table = torch.cat([table, table[-1:].expand(groups * group - n_in, -1)])
    table = table.reshape(groups, group, n_out)
    low, high = table.amin(1), table.amax(1)
    most = (1 << scheme.bits) - 1
    scale, zero, codes = (torch.empty(0, device=weight.device),) * 3
    least: Tensor | None = None
    for share in _RANGES:
        tried, tried_zero = _range(low * share, high * share, scheme, most)
        tried_codes = (table / tried[:, None].float() + tried_zero[:, None]).round_().clamp_(0, most)
        error = ((tried_codes - tried_zero[:, None]) * tried[:, None].float() - table).square_().sum(1)
        if least is None:
            scale, zero, codes, least = tried, tried_zero, tried_codes, error
            continue
        better = error < least
        least = torch.where(better, error, least)
        scale, zero = torch.where(better, tried, scale), torch.where(better, tried_zero, zero)
        codes = torch.where(better[:, None], tried_codes, codes)
    flat = codes.reshape(groups * group, n_out)[:n_in].to(torch.uint8)
    zeros = zero.to(torch.uint8) if scheme.has_zeros else None
    return pack(flat, scale, zeros, bits=scheme.bits, group=group)


def _range(low: Tensor, high: Tensor, scheme: Scheme, most: int) -> tuple[Tensor, Tensor]:
    """(groups, out) scales, as they are stored, and zero points (float32, whole) for a range of weights."""
    if not scheme.has_zeros:
        half = float(1 << (scheme.bits - 1))
        scale = torch.maximum(low.abs(), high.abs()) / (half - 1)
        return _nonzero(scale, torch.float32), torch.full_like(scale, half)
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)  # zero stays zero
    scale = _nonzero((high - low) / most, torch.float16)
    return scale, (-low / scale.float()).round().clamp(0, most)


def _nonzero(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales in the dtype in which they are stored; one where a group holds zeros alone."""
    stored = scale.to(dtype)
    return torch.where(stored > 0, stored, torch.ones((), dtype=dtype, device=scale.device))
