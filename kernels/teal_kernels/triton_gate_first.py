"""Triton backend of `teal_kernels.gate_first`: the rows of live neurons, and no others, in one launch.

A program owns some neighbouring neurons. It looks at their gates, counts the live ones, and takes
these a few at a time: it reads their rows of the weight from end to end, multiplies, adds up in
float32, applies the activation and writes the result; to dead neurons it writes zero. Which neuron
is the k-th live one follows from a running count in registers, so there is no list in memory, no
second launch, nothing that the host must know, and no atomic: the same inputs give the same bits on
every run, and a CUDA graph can hold the launch. A program whose neurons are all dead ends at once;
many small programs even out what the others have to read.

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
    """How the product is cut up."""

    neurons: int = 16
    """Of a program (power of two)."""
    block_out: int = 2
    """Live neurons at a time (power of two)."""
    block_in: int = 1024
    """Inputs of a tile (power of two); fewer for several tokens, whose sums need the registers."""
    unroll: int = 4
    """Tiles in flight at a time."""
    warps: int = 4
    evict_first: bool = True
    """Let the weights leave the L2 cache before anything else does."""


UNTUNED = GateFirstConfig()


def triton_gate_first(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    kind: str,
    threshold: float,
    config: GateFirstConfig = UNTUNED,
) -> Tensor:
    """On a GPU (or in the interpreter); arguments and result as `gate_first`.

    Accumulates in float32 for float16, bfloat16 and float32 weights. Deterministic.
    """
    n_out, n_in = weight.shape
    inputs, gates = x.reshape(-1, n_in).contiguous(), gate.reshape(-1, n_out).contiguous()
    hidden = gates.new_empty(gates.shape)
    for first in range(0, inputs.shape[0], _MAX_ROWS):
        part = slice(first, first + _MAX_ROWS)
        launch_gate_first(
            inputs[part], gates[part], weight, bias, hidden[part], kind=kind, threshold=threshold, config=config
        )
    return hidden.view(gate.shape)


def launch_gate_first(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hidden: Tensor,
    *,
    kind: str,
    threshold: float,
    config: GateFirstConfig = UNTUNED,
    pdl: bool | None = None,
) -> None:
    """One launch.

    Args:
        x: (rows, in), contiguous, rows from 1 to 8.
        gate: (rows, out), contiguous.
        weight: (out, in); rows that are not contiguous are copied.
        bias: (out,) or None.
        hidden: (rows, out), contiguous, written.
        kind: as `GateActivation.kind`.
        threshold: of fatrelu, a value of gate's dtype.
        config: how the product is cut up.
        pdl: launch while the kernel before still runs; by default where the GPU can.
    """
    rows, n_in = x.shape
    n_out = weight.shape[0]
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    block_in = max(_LEAST_BLOCK_IN, config.block_in // power_of_two(rows))
    block_in = min(block_in, power_of_two(n_in))
    tiles = -(-n_in // block_in)
    launch(
        gate_first_kernel,
        (-(-n_out // config.neurons),),
        x,
        gate,
        weight,
        x if bias is None else bias,
        hidden,
        n_in,
        n_out,
        weight.stride(0),
        threshold,
        KIND=_KINDS[kind],
        ROWS=rows,
        HAS_BIAS=bias is not None,
        NEURONS=config.neurons,
        BLOCK_OUT=config.block_out,
        BLOCK_IN=block_in,
        UNROLL=min(config.unroll, power_of_two(tiles)),
        EVICT="evict_first" if config.evict_first else "",
        warps=config.warps,
        pdl=hopper_or_later(x.device) if pdl is None else pdl,
    )
