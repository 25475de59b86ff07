"""Triton backend of routed MLPs: the rows of gate and up of chosen groups, and no others, without the host.

The router is a launch of its own (two with a first layer): a program computes the logits of a few groups for all rows
of the batch, and writes for each whether it is chosen. In the next launch a program owns some neighbouring neurons of
one group. It reads that word, and where no row chose the group it writes zeros and ends; else it reads the rows of gate
and up from end to end, multiplies as gate first does (`triton_gate_first`), activates, and writes zero for the rows of
the batch that did not choose it. So there is no list that programs would wait for, nothing that the host must know, and
no floating-point atomic: the same inputs give the same bits on every run, and a CUDA graph can hold the launches. What
reads the result skips its zeros (`triton_gemv`).

Importable without triton.
"""

from dataclasses import dataclass
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from teal_kernels.launching import ACTIVATIONS, LEAST_TILE, TRITON_MISSING, hopper_or_later, launch, power_of_two
from teal_kernels.operands import Norm
from teal_kernels.triton_gate_first import WIDTH, GateLayer, LayerPointers, NormPointers, row_major, tiles_of

if TRITON_MISSING is None:
    from teal_kernels.jit_routed import group_logits_kernel, routed_kernel

MAX_ROWS = 8
"""Tokens that one launch takes: each has sums of its own in registers."""


@dataclass(frozen=True)
class RoutedConfig:
    """How a product of rows is divided."""

    neurons: int
    """Of a program (power of two); of a group as many as divide it, at most."""
    block_in: int
    """Inputs of a tile (power of two)."""
    unroll: int
    """Tiles in flight at a time."""
    warps: int
    evict_first: bool = True
    """Let the weights leave the L2 cache before anything else does."""


def routed_config(n_in: int, rows: int, group: int) -> RoutedConfig:
    """For gate and up. More rows than one are what tensor cores are for, where a group has enough neurons."""
    if rows > 1 and group % LEAST_TILE == 0:
        return RoutedConfig(neurons=min(32, group & -group), block_in=128, unroll=1, warps=4)
    warps = 4 if n_in <= 4 * WIDTH else 8
    block_in = WIDTH * warps // 4
    return RoutedConfig(min(2, group & -group), block_in, min(4, -(-n_in // block_in)), warps)


def router_config(n_in: int, n_out: int, rows: int) -> RoutedConfig:
    """For a layer of a router: programs enough to occupy a GPU, of few groups as of thousands of neurons."""
    if rows > 1 and n_out >= 64 * LEAST_TILE:
        return RoutedConfig(neurons=LEAST_TILE, block_in=128, unroll=1, warps=4)
    block_in = min(WIDTH, max(LEAST_TILE, power_of_two(n_in)))
    return RoutedConfig(2 if n_out <= WIDTH else 8, block_in, min(4, -(-n_in // block_in)), 4, evict_first=False)


@dataclass(frozen=True)
class GroupRouter:
    """What chooses groups of neurons."""

    first: Tensor | None
    """(rank, in) of a layer with ReLU behind it."""
    weight: Tensor
    """(groups, rank or in)"""
    bias: Tensor
    """(groups,)"""
    group: int
    """Neurons of each."""


class _RouterSizes(NamedTuple):
    n_in: int
    n_out: int
    stride: int
    """Elements from one row of the weight to the next."""
    group: int
    n_squares: int
    """Partial sums of squares that the norm reads for each row."""
    eps: float
    """Of the norm."""


class _RoutedSizes(NamedTuple):
    n_in: int
    n_out: int
    gate_stride: int
    up_stride: int
    group: int
    n_groups: int
    n_squares: int
    eps: float
    threshold: float
    """Of fatrelu."""


def route_groups(
    x: Tensor,
    router: GroupRouter,
    chosen: Tensor,
    ranked: Tensor | None,
    *,
    norm: Norm | None = None,
    counts: Tensor | None = None,
    pdl: bool | None = None,
) -> None:
    """One launch a layer of the router.

    Args:
        x: (rows, in), contiguous, rows from 1 to 8.
        router: what chooses.
        chosen: (rows, groups) int32, contiguous, written: 1 where the logit is above 0, or a NaN, and else 0.
        ranked: (rows, rank) of x's dtype, contiguous, written: what lies between the layers; None for one layer.
        norm: an RMS norm of x before all else.
        counts: (1,) int64: the neurons that each row chose are added to it.
        pdl: as in `launch_gate_first`.

    Raises:
        ValueError: too many rows, or `ranked` with one layer or missing with two.
    """
    _check_rows(x)
    if (router.first is None) != (ranked is None):
        raise ValueError("what lies between two layers belongs to a router of two layers")
    source = x
    if router.first is not None and ranked is not None:
        _launch_layer(x, router.first, None, ranked, norm, None, router.group, chooses=False, pdl=pdl)
        source, norm = ranked, None
    _launch_layer(source, router.weight, router.bias, chosen, norm, counts, router.group, chooses=True, pdl=pdl)


def _launch_layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    norm: Norm | None,
    counts: Tensor | None,
    group: int,
    *,
    chooses: bool,
    pdl: bool | None,
) -> None:
    (rows, n_in), weight, n_out = x.shape, row_major(weight), weight.shape[0]
    config = router_config(n_in, n_out, rows)
    fma = rows == 1 or config.neurons < LEAST_TILE
    squares = 1 if norm is None else norm.squares.shape[1]
    launch(
        group_logits_kernel,
        (-(-n_out // config.neurons),),
        x,
        None if norm is None else NormPointers(norm.weight, norm.squares),
        LayerPointers(weight, bias),
        y,
        counts,
        _RouterSizes(n_in, n_out, weight.stride(0), group, squares, 0.0 if norm is None else norm.eps),
        ROWS=rows,
        SQUARES=power_of_two(squares),
        PLUS_ONE=norm is not None and norm.plus_one,
        CHOOSES=chooses,
        OUTPUTS=config.neurons,
        TILE=_tiles(config, rows, n_in, fma),
        warps=config.warps,
        pdl=hopper_or_later(x.device) if pdl is None else pdl,
    )


def launch_routed(
    x: Tensor,
    chosen: Tensor,
    gate: GateLayer,
    up: GateLayer,
    hidden: Tensor,
    *,
    group: int,
    kind: str,
    threshold: float = 0.0,
    norm: Norm | None = None,
    whole: bool = False,
    config: RoutedConfig | None = None,
    pdl: bool | None = None,
) -> None:
    """One launch: activation(gate) * up of chosen groups, and zeros for the others.

    Args:
        x: (rows, in), contiguous, rows from 1 to 8.
        chosen: (rows, groups) int32, as `route_groups` writes it.
        gate: weight (out, in), out = groups * group; rows that are not contiguous are copied.
        up: the same.
        hidden: (rows, out), contiguous, written.
        group: neurons of each.
        kind: activation, of `launching.ACTIVATIONS`.
        threshold: of fatrelu, a value of x's dtype.
        norm: an RMS norm of x before all else.
        whole: compute all neurons; what was left out is zero all the same.
        config: how the product is divided.
        pdl: as in `launch_gate_first`.

    Raises:
        ValueError: too many rows, or neurons that are not those of the groups.
    """
    _check_rows(x)
    (rows, n_in), n_out, groups = x.shape, gate.weight.shape[0], chosen.shape[1]
    if groups * group != n_out or up.weight.shape != gate.weight.shape:
        raise ValueError(f"{groups} groups of {group} are not {n_out} neurons of gate and {up.weight.shape[0]} of up")
    config = config or routed_config(n_in, rows, group)
    neurons = gcd(config.neurons, group)
    of_gate, of_up = (LayerPointers(row_major(layer.weight), layer.bias) for layer in (gate, up))
    squares = 1 if norm is None else norm.squares.shape[1]
    launch(
        routed_kernel,
        (n_out // neurons,),
        x,
        None if norm is None else NormPointers(norm.weight, norm.squares),
        of_gate,
        of_up,
        chosen,
        hidden,
        _RoutedSizes(
            n_in=n_in,
            n_out=n_out,
            gate_stride=of_gate.weight.stride(0),
            up_stride=of_up.weight.stride(0),
            group=group,
            n_groups=groups,
            n_squares=squares,
            eps=0.0 if norm is None else norm.eps,
            threshold=threshold,
        ),
        KIND=ACTIVATIONS[kind],
        ROWS=rows,
        SQUARES=power_of_two(squares),
        PLUS_ONE=norm is not None and norm.plus_one,
        WHOLE=whole,
        NEURONS=neurons,
        TILE=_tiles(config, rows, n_in, rows == 1 or neurons < LEAST_TILE, neurons),
        warps=config.warps,
        pdl=hopper_or_later(x.device) if pdl is None else pdl,
    )


def _tiles(config: RoutedConfig, rows: int, n_in: int, fma: bool, neurons: int | None = None) -> NamedTuple:
    evict = "evict_first" if config.evict_first else ""
    return tiles_of(neurons or config.neurons, config.block_in, config.unroll, rows, n_in, fma, evict)


def _check_rows(x: Tensor) -> None:
    if x.shape[0] > MAX_ROWS:
        raise ValueError(f"{x.shape[0]} rows are more than the {MAX_ROWS} that one launch takes")


def no_choice(rows: int, router: GroupRouter, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """What `route_groups` writes: `chosen`, and `ranked` where the router has two layers."""
    chosen = torch.zeros(rows, router.weight.shape[0], dtype=torch.int32, device=device)
    if router.first is None:
        return chosen, None
    return chosen, torch.zeros(rows, router.first.shape[0], dtype=dtype, device=device)
