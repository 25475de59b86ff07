"""Codes, scales and zero points of one projection: ranges for the least squared error, then nearest codes or GPTQ's.

Zero points are not whole numbers, but where a group's range begins: weights that lie on sixteen steps
come back as they were.
"""

import torch
from torch import Tensor

from teal_cli.schemes import Scheme
from teal_kernels.packing import Packed, pack

_RANGES = torch.linspace(1.0, 0.7, 13).tolist()
"""Shares of a group's range that are tried. The whole range first: it wins a draw."""
_MOST_ZERO = 30_000.0
"""A zero point, in steps; float16 ends at 65,504."""
_DAMPING = 0.01
"""Of GPTQ: share of the mean diagonal that is added to it."""
_COLUMNS = 128
"""Of GPTQ: inputs after which the weights of all that follow are corrected."""


@torch.no_grad()
def quantise(weight: Tensor, scheme: Scheme) -> Packed:
    """Quantise one projection to the nearest codes.

    Args:
        weight: (out, in), floating, on any device.
        scheme: bits and groups.

    Returns:
        Codes, scales (float16 for groups, float32 for whole outputs) and, for 4 bits, zero points (float16).
    """
    table = weight.detach().t().float()
    group = scheme.group_of(len(table))
    scale, zero = _ranges(table, scheme)
    return _packed(_codes(table, _each(scale, table, group), _each(zero, table, group), scheme), scale, zero, scheme)


@torch.no_grad()
def gptq(weights: list[Tensor], products: Tensor, scheme: Scheme) -> list[Packed]:
    """Quantise the projections that read one hidden state so that their outputs change least on what it was.

    GPTQ (arXiv 2210.17323): inputs are rounded one after the other, those that are largest first, and the error
    of each is made up for by the weights of those that follow. The ranges of all groups are found before.

    Args:
        weights: (out, in) each, floating.
        products: (in, in) float32: sum of x x^T over the inputs seen; on the weights' device.
        scheme: bits and groups.

    Returns:
        Of each projection, as `quantise`.
    """
    table = torch.cat([weight.detach().t().float() for weight in weights], dim=1)
    n_in = len(table)
    group = scheme.group_of(n_in)
    energy = products.diagonal()
    scale, zero = _ranges(table, scheme, energy)
    order = energy.argsort(descending=True)
    damped = products[order][:, order].double()
    damped.diagonal().add_(_DAMPING * float(energy.mean()) or 1.0)
    # The upper factor of the inverse: row i tells what follows i how to make up for i's error.
    spread = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True).float()
    rest = table[order]
    scales, zeros = _each(scale, table, group)[order], _each(zero, table, group)[order]
    codes = torch.empty_like(rest)
    for start in range(0, n_in, _COLUMNS):
        stop = min(start + _COLUMNS, n_in)
        errors = torch.empty_like(rest[start:stop])
        for i in range(start, stop):
            codes[i] = _codes(rest[i], scales[i], zeros[i], scheme)
            error = (rest[i] - (codes[i] - zeros[i]) * scales[i]) / spread[i, i]
            rest[i + 1 : stop].addr_(spread[i, i + 1 : stop], error, alpha=-1.0)
            errors[i - start] = error
        rest[stop:].addmm_(spread[start:stop, stop:].t(), errors, alpha=-1.0)
    outs = [len(weight) for weight in weights]
    in_order = torch.empty_like(codes).index_copy_(0, order, codes)
    parts = zip(in_order.split(outs, 1), scale.split(outs, 1), zero.split(outs, 1), strict=True)
    return [_packed(*part, scheme) for part in parts]


def _ranges(table: Tensor, scheme: Scheme, energy: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scales as they are stored, and zero points in float32: (groups, out) each.

    Args:
        table: (in, out) float32.
        scheme: bits and groups.
        energy: (in,) how much an input's error counts; None for all alike.
    """
    n_in, n_out = table.shape
    group = scheme.group_of(n_in)
    missing = -n_in % group
    counts = torch.ones(n_in, device=table.device) if energy is None else energy
    if missing:  # what fills the last group is a copy of its last input, and changes no range
        table = torch.cat([table, table[-1:].expand(missing, -1)])
        counts = torch.cat([counts, counts.new_zeros(missing)])
    table, counts = table.reshape(-1, group, n_out), counts.reshape(-1, group, 1)
    low, high = table.amin(1), table.amax(1)
    scale, zero = (torch.empty(0, device=table.device),) * 2
    least: Tensor | None = None
    for share in _RANGES:
        tried, tried_zero = _range(low, high, share, scheme)
        steps = tried[:, None].float()
        codes = _codes(table, steps, tried_zero[:, None], scheme)
        error = ((codes - tried_zero[:, None]) * steps - table).square_().mul_(counts).sum(1)
        if least is None:
            scale, zero, least = tried, tried_zero, error
            continue
        better = error < least
        least = torch.where(better, error, least)
        scale, zero = torch.where(better, tried, scale), torch.where(better, tried_zero, zero)
    return scale, zero


def _range(low: Tensor, high: Tensor, share: float, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scales and zero points for a share of a range of weights."""
    if not scheme.has_zeros:
        half = float(1 << (scheme.bits - 1))
        scale = torch.maximum(low.abs(), high.abs()) * share / (half - 1)
        return _nonzero(scale, torch.float32), torch.full_like(scale, half)
    middle, reach = (low + high) / 2, (high - low) / 2 * share
    # No step so small beside its group's weights that the zero point would pass what float16 holds.
    least = torch.maximum(low.abs(), high.abs()) / _MOST_ZERO
    scale = _nonzero(torch.maximum(2 * reach / ((1 << scheme.bits) - 1), least), torch.float16)
    return scale, ((reach - middle) / scale.float()).to(torch.float16).float()


def _nonzero(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales in the dtype in which they are stored; one where all weights of a group are alike."""
    stored = scale.to(dtype)
    return torch.where(stored > 0, stored, torch.ones((), dtype=dtype, device=scale.device))


def _codes(weights: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> Tensor:
    """The nearest codes, float32."""
    return (weights / scale.float() + zero).round_().clamp_(0, (1 << scheme.bits) - 1)


def _each(values: Tensor, table: Tensor, group: int) -> Tensor:
    """(groups, out) -> (in, out) float32: every input's."""
    return values.float().repeat_interleave(group, dim=0)[: len(table)]


def _packed(codes: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> Packed:
    zeros = zero.to(torch.float16) if scheme.has_zeros else None
    return pack(codes.to(torch.uint8), scale, zeros, bits=scheme.bits, group=scheme.group_of(len(codes)))
