"""Triton backend of `teal_kernels.gate_first`: the rows of live neurons, and no others, in one launch.

A program owns some neighbouring neurons. It has their gates, or computes them first; it counts the
live ones and takes these a few at a time: it reads their rows of the weight from end to end,
multiplies, adds up in float32, applies the activation and writes the result; to dead neurons it
writes zero. Which neuron is the k-th live one follows from a running count in registers, so there is
no list in memory, no second launch, nothing that the host must know, and no atomic: the same inputs
give the same bits on every run, and a CUDA graph can hold the launch. A program whose neurons are
all dead ends at once; many small programs even out what the others have to read. Where the gates
are computed in the same launch, the rows of one program's live neurons travel beside the gate
rows of others, and the memory never waits for a kernel to end.

For several tokens a row of weights is read if the neuron lives for any of them.
"""

from dataclasses import dataclass

from torch import Tensor

from teal_kernels.launching import TRITON_MISSING, hopper_or_later, launch, power_of_two

if TRITON_MISSING is None:
    from teal_kernels.jit_gate_first import gate_first_kernel

_KINDS = {"relu": 0, "fatrelu": 1, "relu2": 2, "drelu": 3}
_MAX_ROWS = 8
"""Tokens that one launch takes: each has sums of its own in registers."""
_LEAST_BLOCK_IN = 64


@dataclass(frozen=True)
class GateFirstConfig:
    """How the product is divided."""

    neurons: int = 8
    """Of a program (power of two)."""
    block_out: int = 4
    """Live neurons at a time (power of two)."""
    block_in: int = 1024
    """Inputs of a tile (power of two); fewer for several tokens, whose sums need the registers."""
    unroll: int = 4
    """Tiles in flight at a time."""
    warps: int = 4
    gate_block_in: int = 1024
    """As block_in, for the gates of all neurons of a program, where the launch computes them."""
    gate_unroll: int = 2
    evict_first: bool = True
    """Let the weights leave the L2 cache before anything else does."""


UNTUNED = GateFirstConfig()
"""Where the gates are given; like the next, the fastest of those tried on an H100 (gate-first-gpu.json)."""
UNTUNED_FUSED = GateFirstConfig(neurons=4, block_out=1)
"""Where the launch computes them."""


@dataclass(frozen=True)
class GateLayer:
    """What gives the gates."""

    weight: Tensor
    """(out, in)"""
    bias: Tensor | None
    """(out,)"""


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
        config: how the product is divided.
        pdl: launch while the kernel before still runs; by default where the GPU can.
    """
    rows, n_in = x.shape
    n_out = weight.shape[0]
    fused = isinstance(gate, GateLayer)
    config = config or (UNTUNED_FUSED if fused else UNTUNED)
    weight = _row_major(weight)
    gates = _row_major(gate.weight) if isinstance(gate, GateLayer) else gate
    gate_bias = gate.bias if isinstance(gate, GateLayer) else None
    block_in, unroll = _tiles(config.block_in, config.unroll, rows, n_in)
    gate_block_in, gate_unroll = _tiles(config.gate_block_in, config.gate_unroll, rows, n_in)
    launch(
        gate_first_kernel,
        (-(-n_out // config.neurons),),
        x,
        gates,
        x if gate_bias is None else gate_bias,
        weight,
        x if bias is None else bias,
        hidden,
        n_in,
        n_out,
        gates.stride(0),
        weight.stride(0),
        threshold,
        KIND=_KINDS[kind],
        ROWS=rows,
        FUSED=fused,
        HAS_GATE_BIAS=gate_bias is not None,
        HAS_BIAS=bias is not None,
        NEURONS=config.neurons,
        GATE_BLOCK_IN=gate_block_in,
        GATE_UNROLL=gate_unroll,
        BLOCK_OUT=config.block_out,
        BLOCK_IN=block_in,
        UNROLL=unroll,
        EVICT="evict_first" if config.evict_first else "",
        warps=config.warps,
        pdl=hopper_or_later(x.device) if pdl is None else pdl,
    )


def _row_major(weight: Tensor) -> Tensor:
    return weight if weight.stride(1) == 1 else weight.contiguous()


def _tiles(block_in: int, unroll: int, rows: int, n_in: int) -> tuple[int, int]:
    """Inputs of a tile and tiles in flight, as a batch of so many rows and so many inputs can use them."""
    fitting = min(max(_LEAST_BLOCK_IN, block_in // power_of_two(rows)), power_of_two(n_in))
    return fitting, min(unroll, power_of_two(-(-n_in // fitting)))
