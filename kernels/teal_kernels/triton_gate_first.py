"""Triton backend of `teal_kernels.gate_first`: the rows of live neurons, and no others, in one launch.

A program owns some neighbouring neurons. It has their gates, or computes them first; it counts the
live ones and takes these a few at a time: it reads their rows of the weight from end to end,
multiplies, adds up in float32, applies the activation and writes the result; to dead neurons it
writes zero. Which neuron is the k-th live one follows from a running count in registers, so there is
no list in memory, no second launch, nothing that the host must know, and no floating-point atomic: the same
inputs give the same bits on every run, and a CUDA graph can hold the launch. A program whose neurons are
all dead ends at once; many small programs even out what the others have to read. Where the gates
are computed in the same launch, the rows of one program's live neurons travel beside the gate
rows of others, and the memory never waits for a kernel to end; the first gate rows travel while the
kernel before still runs (`pdl`).

For several tokens a row of weights is read if the neuron lives for any of them. They are multiplied by FMA
instructions, or on tensor cores where a tile has enough neurons (`GateFirstConfig.fma`).

As a step of a decoded token the launch normalises what it reads, as `triton_gemv` does, and counts live neurons. It can
also compute all of them, for a dense token.
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from teal_kernels.launching import ACTIVATIONS, LEAST_TILE, TRITON_MISSING, hopper_or_later, launch, power_of_two
from teal_kernels.operands import Norm

if TRITON_MISSING is None:
    from teal_kernels.jit_gate_first import gate_first_kernel

_MAX_ROWS = 8
"""Tokens that one launch takes: each has sums of its own in registers."""
_LEAST_BLOCK_IN = 64
WIDTH = 1024
"""Inputs of 16 bits that four warps load at once."""


@dataclass(frozen=True)
class GateFirstConfig:
    """How the product is divided."""

    neurons: int = 8
    """Of a program (power of two)."""
    block_out: int = 4
    """Live neurons at a time (power of two)."""
    block_in: int = 1024
    """Inputs of a tile (power of two); on the FMA path fewer for several tokens, whose sums need the registers."""
    unroll: int = 4
    """Tiles in flight at a time."""
    warps: int = 4
    gate_block_in: int = 1024
    """As block_in, for the gates of all neurons of a program, where the launch computes them."""
    gate_unroll: int = 2
    evict_first: bool = True
    """Let the weights leave the L2 cache before anything else does."""
    late: bool = False
    """Let the next kernel begin once a program has its gates, and not before it computes them."""

    def fma(self, rows: int) -> bool:
        """Whether so many tokens are multiplied by FMA instructions: tensor cores take 16 neurons at a time."""
        return rows == 1 or min(self.neurons, self.block_out) < LEAST_TILE


UNTUNED = GateFirstConfig()
"""Where the gates are given; like the next, the fastest of those tried on an H100 (gate-first-gpu.json)."""
UNTUNED_FUSED = GateFirstConfig(neurons=4, block_out=1)
"""Where the launch computes them."""


def step_config(n_in: int, rows: int) -> GateFirstConfig:
    """For a step of a decoded token, sparse or dense.

    One row: so few neurons that all of their gate rows travel at once, before the kernel in front has ended. More rows
    are what tensor cores are for.
    """
    if rows > 1:
        return GateFirstConfig(
            neurons=32, block_out=16, block_in=128, unroll=1, warps=4, gate_block_in=128, gate_unroll=1
        )
    warps = 4 if n_in <= 5 * WIDTH else 8
    block_in = WIDTH * warps // 4
    unroll = min(5, -(-n_in // block_in))
    return GateFirstConfig(
        neurons=2,
        block_out=1,
        block_in=block_in,
        unroll=unroll,
        warps=warps,
        gate_block_in=block_in,
        gate_unroll=unroll,
        late=True,
    )


@dataclass(frozen=True)
class GateLayer:
    """What gives the gates."""

    weight: Tensor
    """(out, in)"""
    bias: Tensor | None
    """(out,)"""


class NormPointers(NamedTuple):
    """As kernels read a norm."""

    weight: Tensor
    squares: Tensor


class LayerPointers(NamedTuple):
    """As kernels read a layer."""

    weight: Tensor
    """Or what the gate's product is."""
    bias: Tensor | None


class _Sizes(NamedTuple):
    n_in: int
    n_out: int
    gate_stride: int
    """Elements from one row of the weight to the next."""
    up_stride: int
    n_squares: int
    """Partial sums of squares that the norm reads for each row."""
    eps: float
    """Of the norm."""
    threshold: float
    """Of fatrelu."""


class _What(NamedTuple):
    """Which launch it is."""

    gates: bool
    """Whether it computes the gates."""
    dense: bool
    """Whether it computes all neurons."""
    plus_one: bool
    """Whether the norm multiplies by 1 + weight."""
    late: bool
    ahead: bool
    """Whether it reads weights before it waits for the kernel before."""


class Tiles(NamedTuple):
    """How a kernel reads rows of weights."""

    block_out: int
    block_in: int
    unroll: int
    fma: bool
    at_once: bool
    """Whether the tiles in flight are all there are."""
    full: bool
    """Whether no tile that is read reaches beyond the inputs."""
    evict: str


def triton_gate_first(
    x: Tensor,
    gate: Tensor | GateLayer,
    weight: Tensor,
    bias: Tensor | None,
    *,
    kind: str,
    threshold: float,
    config: GateFirstConfig | None = None,
) -> Tensor:
    """On a GPU (or in the interpreter); arguments and result as `gate_first`, or `gated_hidden` for a layer.

    Accumulates in float32 for float16, bfloat16 and float32 weights. Deterministic.
    """
    n_out, n_in = weight.shape
    inputs = x.reshape(-1, n_in).contiguous()
    gates = gate if isinstance(gate, GateLayer) else gate.reshape(-1, n_out).contiguous()
    hidden = inputs.new_empty(inputs.shape[0], n_out)
    for first in range(0, inputs.shape[0], _MAX_ROWS):
        part = slice(first, first + _MAX_ROWS)
        launch_gate_first(
            inputs[part],
            gates if isinstance(gates, GateLayer) else gates[part],
            weight,
            bias,
            hidden[part],
            kind=kind,
            threshold=threshold,
            config=config,
        )
    return hidden.view(*x.shape[:-1], n_out)


def launch_gate_first(
    x: Tensor,
    gate: Tensor | GateLayer,
    weight: Tensor,
    bias: Tensor | None,
    hidden: Tensor,
    *,
    kind: str,
    threshold: float,
    norm: Norm | None = None,
    dense: bool = False,
    counts: Tensor | None = None,
    config: GateFirstConfig | None = None,
    pdl: bool | None = None,
) -> None:
    """One launch.

    Args:
        x: (rows, in), contiguous, rows from 1 to 8.
        gate: the gate product (rows, out), contiguous, or the layer that gives it.
        weight: (out, in) of up; rows that are not contiguous are copied.
        bias: (out,) or None.
        hidden: (rows, out), contiguous, written.
        kind: as `GateActivation.kind`.
        threshold: of fatrelu, a value of x's dtype.
        norm: an RMS norm of x before all else.
        dense: compute every neuron, of which dead ones are zero all the same; nothing is counted. For a layer.
        counts: (1,) int64: the live neurons of each row are added to it.
        config: how the product is divided.
        pdl: launch while the kernel before still runs, by default where the GPU can. True promises that it does not
            write the weights, nor those of the norm: they are read before the wait for it.

    Raises:
        ValueError: too many rows, or a dense launch whose gates are given.
    """
    rows, n_in = x.shape
    n_out = weight.shape[0]
    layer = gate if isinstance(gate, GateLayer) else None
    if rows > _MAX_ROWS:
        raise ValueError(f"{rows} rows are more than the {_MAX_ROWS} that one launch takes")
    if dense and layer is None:
        raise ValueError("a dense launch computes the gates itself")
    config = config or (UNTUNED if layer is None else UNTUNED_FUSED)
    weight = row_major(weight)
    of_gate = (
        LayerPointers(gate, None) if isinstance(gate, Tensor) else LayerPointers(row_major(gate.weight), gate.bias)
    )
    fma = config.fma(rows)
    evict = "evict_first" if config.evict_first else ""
    launch(
        gate_first_kernel,
        (-(-n_out // config.neurons),),
        x,
        None if norm is None else NormPointers(norm.weight, norm.squares),
        of_gate,
        LayerPointers(weight, bias),
        hidden,
        None if dense else counts,
        _Sizes(
            n_in=n_in,
            n_out=n_out,
            gate_stride=of_gate.weight.stride(0),
            up_stride=weight.stride(0),
            n_squares=1 if norm is None else norm.squares.shape[1],
            eps=0.0 if norm is None else norm.eps,
            threshold=threshold,
        ),
        KIND=ACTIVATIONS[kind],
        ROWS=rows,
        SQUARES=1 if norm is None else power_of_two(norm.squares.shape[1]),
        WHAT=_What(
            gates=layer is not None,
            dense=dense,
            plus_one=norm is not None and norm.plus_one,
            late=config.late,
            ahead=pdl is not None,
        ),
        NEURONS=config.neurons,
        GATE=tiles_of(config.neurons, config.gate_block_in, config.gate_unroll, rows, n_in, fma, evict),
        UP=tiles_of(config.block_out, config.block_in, config.unroll, rows, n_in, fma, evict),
        warps=config.warps,
        pdl=hopper_or_later(x.device) if pdl is None else pdl,
    )


def row_major(weight: Tensor) -> Tensor:
    """A weight whose rows are contiguous: itself, or a copy."""
    return weight if weight.stride(1) == 1 else weight.contiguous()


def tiles_of(block_out: int, block_in: int, unroll: int, rows: int, n_in: int, fma: bool, evict: str) -> Tiles:
    """Inputs of a tile and tiles in flight, as a batch of so many rows and so many inputs can use them."""
    each = block_in // power_of_two(rows) if fma else block_in
    fitting = min(max(_LEAST_BLOCK_IN, each), max(LEAST_TILE, power_of_two(n_in)))
    unroll = min(unroll, power_of_two(-(-n_in // fitting)))
    at_once = fma and fitting * unroll >= n_in
    # In a loop the FMA path asks for the tiles behind the last ones too.
    full = n_in % (fitting * unroll) == 0 and (at_once or not fma)
    return Tiles(block_out, fitting, unroll, fma, at_once, full, evict)
