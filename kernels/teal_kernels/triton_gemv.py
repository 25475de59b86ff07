"""Triton backend: one decoded token's matrix-vector product that reads only the rows that matter.

The weight is an input-major table (in, out): one row per input. A program owns a block of outputs
and a split-K chunk of the inputs. It lists the inputs of its chunk that are above the threshold, adds
up their rows in float32 and sends its partial sums to memory. The programs of the last chunks then
finish the block, a slice each: they wait until the partial sums of every chunk have come and add them
in a fixed order, so there is no second launch, no output to clear and no floating-point atomic, and
the same inputs give the same bits on every run. A word that has not come holds the bits of a NaN that
no arithmetic makes, so the words need no counter and no fence beside them: on an H100 that is 1 to 2
microseconds a product less than a counter of arrivals.

Around the product the kernel takes up what would otherwise be launches of their own: before it the
RMS norm (`Norm`) or the merging of split-KV partials (`AttentionPartials`); after it, as its epilogue,
the bias, the residual sum with its sum of squares or the gated activation. Several projections that read
one hidden state are parts of one table, each with its own threshold.

`plan_gemv` decides how a product is launched. Importable without triton; without a GPU it runs under
TRITON_INTERPRET=1.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from teal_kernels.experts import NO_EXPERTS, Chosen
from teal_kernels.launching import ACTIVATIONS, EMPTY, TRITON_MISSING, device_facts, launch
from teal_kernels.operands import Added, AttentionPartials, Beside, Norm, Scratch
from teal_kernels.packing import Packed, bits_of
from teal_kernels.plan_gemv import MAX_LISTED, MAX_ROWS, ProductShape, TileConfig, plan_product
from teal_kernels.plan_gemv import squares_of as planned_squares

if TRITON_MISSING is None:
    from teal_kernels.jit_gemv import gemv_kernel

__all__ = ["MAX_LISTED", "MAX_ROWS", "TileConfig", "gemv", "squares_of"]

_DEFAULT_ACTIVATIONS = {"gated": "silu"}
_CURVED = ("xielu", "clamped_swiglu")
"""Activations whose numbers are a `Curve`."""


class _NormPointers(NamedTuple):
    """As the kernel reads them; so are the next. (Numbers are apart: they come after all pointers, in `_Sizes`.)"""

    weight: Tensor
    bias: Tensor | None
    squares: Tensor


class _AddedPointers(NamedTuple):
    y: Tensor
    weight: Tensor
    sums: Tensor
    stream: Tensor


def norm_pointers(norm: Norm, sums: Tensor | None = None) -> NamedTuple:
    """A norm as kernels read it; `sums` in the place of its own squares, where something is added before."""
    return _NormPointers(norm.weight, norm.bias, norm.squares if sums is None else sums)


class _PartialsPointers(NamedTuple):
    sums: Tensor
    logs: Tensor
    longest: Tensor


class _TablePointers(NamedTuple):
    weights: Tensor
    """Or words of several."""
    scales: Tensor | None
    zeros: Tensor | None


class _OutputPointers(NamedTuple):
    bias: Tensor | None
    y: Tensor
    squares: Tensor | None
    stream: Tensor | None
    norm_weight: Tensor | None


class _MemoryPointers(NamedTuple):
    partial_sums: Tensor
    """(chunks, rows, blocks) int32: the bits of float32, or `EMPTY`."""
    lists: Tensor
    """Where they do not lie in shared memory."""
    counts: Tensor


class _ExpertPointers(NamedTuple):
    ids: Tensor
    weights: Tensor


class Curve(NamedTuple):
    """Numbers of an activation that has several.

    Of xIELU what the parabola, the exponential and the line are multiplied by; of a clamped SwiGLU its alpha alone.
    """

    first: float
    second: float = 0.0
    third: float = 0.0


class _Sizes(NamedTuple):
    n_in: int
    stride: int
    """Words of the table from one row to the next."""
    part_0: int
    part_1: int
    part_2: int
    inputs_per_chunk: int
    n_chunks: int
    group: int
    """Inputs that share a scale."""
    n_squares: int
    """Partial sums of squares that the norm reads for each row."""
    eps: float
    """Of the norm."""
    window: int
    """Of the attention."""
    threshold: float
    """Of the activation."""
    scale: float
    """Of what `residual` adds."""
    added_eps: float
    of_added: float
    """What is added to the stream is multiplied by it."""
    n_parts: int
    expert_stride: int
    """Words from one expert's table to the next; 0 without experts, as the next."""
    expert_scales: int
    """Scales from one expert's to the next."""


def _shape_of(
    table: Tensor | Packed,
    parts: tuple[int, ...],
    rows: int,
    dtype: torch.dtype,
    epilogue: str = "plain",
    norm: Norm | None = None,
    partials: AttentionPartials | None = None,
    activation: str | None = None,
    scale: float = 1.0,
    sums: bool = False,
    added: Added | None = None,
    beside: Beside | None = None,
    experts: Chosen | None = None,
    own_thresholds: bool = False,
) -> ProductShape:
    packed = table if isinstance(table, Packed) else None
    return ProductShape(
        rows=rows,
        inputs=table.shape[0],
        parts=parts,
        itemsize=dtype.itemsize,
        bits=bits_of(table),
        group=table.shape[0] if packed is None else packed.group,
        row_stride=(table.words if isinstance(table, Packed) else table).stride(0),
        epilogue=epilogue,
        norm_squares=_squares_before(norm, added),
        no_norm=norm is None,
        norm_plus_one=norm is not None and norm.plus_one,
        norm_centred=norm is not None and norm.centred,
        activation=ACTIVATIONS[activation or _DEFAULT_ACTIVATIONS.get(epilogue, "none")],
        scaled=scale != 1.0,
        sums=sums,
        added=added is not None,
        added_plus_one=added is not None and added.plus_one,
        beside_plus_one=beside is not None and beside.plus_one,
        head_size=0 if partials is None else partials.head_size,
        splits=0 if partials is None else partials.splits,
        split_multiple=1 if partials is None else partials.split_multiple,
        own_thresholds=own_thresholds,
        side_by_side=1 if experts is None else experts.side_by_side(epilogue),
        summed=1 if experts is None else experts.summed(epilogue),
    )


def _squares_before(norm: Norm | None, added: Added | None) -> int:
    if added is not None:
        return added.sums.shape[1]
    return 0 if norm is None else norm.squares.shape[-1]


def squares_of(
    table: Tensor | Packed,
    parts: tuple[int, ...],
    config: TileConfig,
    rows: int,
    dtype: torch.dtype,
    experts: Chosen | None = None,
) -> int:
    """Partial sums of squares that a `residual` product of a batch of `rows` in `dtype` writes for each row."""
    if experts is None:
        return planned_squares(_shape_of(table, parts, rows, dtype), config, device_facts(table.device))
    shape = _shape_of(table, parts, 1, dtype, "residual", experts=experts)
    return planned_squares(shape, config, device_facts(table.device)) // rows


def gemv(
    x: Tensor | AttentionPartials,
    table: Tensor | Packed,
    parts: tuple[int, ...],
    thresholds: Tensor,
    y: Tensor,
    config: TileConfig,
    scratch: Scratch,
    *,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    epilogue: str = "plain",
    activation: str | None = None,
    activation_threshold: float = 0.0,
    curve: Curve | None = None,
    scale: float = 1.0,
    squares: Tensor | None = None,
    added: Added | None = None,
    beside: Beside | None = None,
    counts: Tensor | None = None,
    experts: Chosen | None = None,
    pdl: bool = False,
    exclusive_device: bool = True,
) -> None:
    """One launch: norm, threshold, product and what follows it.

    Args:
        x: (rows, in), contiguous, rows from 1 to 8; or what attention left, merged and rounded to the dtype of y.
        table: (in, out), each row contiguous; the dtype of y. Or quantised.
        parts: outputs of each projection in the table, at most three.
        thresholds: (parts,) float32: inputs with |x| <= threshold are dropped; below zero none is. Or (rows, parts), of
            each row of x (of experts: of the tokens).
        y: (rows, out), written. With `residual` it is added to; with `gated` and `paired` it is (rows, out / 2).
        config: how the product is divided.
        scratch: memory between programs, and the lists.
        bias: (out,), of experts (experts, out), or None.
        norm: of x before all else.
        epilogue: `plain`; `activated`: y = activation(product); `residual`: y += scale * product; `gated`: y =
            activation(first part) * second part; `paired`: the same of the one part of experts, in which gate and up
            alternate.
        activation: one of `ACTIVATIONS`; of `gated` SiLU by default.
        activation_threshold: of FATReLU, or the limit of a clamped SwiGLU, as the dtype of y holds it.
        curve: of xIELU and clamped SwiGLU, which need one.
        scale: of what `residual` adds.
        added: what is added to x, one row, before all else; `norm` has no squares of its own then.
        beside: of the epilogue `beside`: y = product, whose norm the next product adds to the stream (`added`); squares
            are (4, `squares_of`), its `sums`.
        squares: (rows, `squares_of`) float32, written by `residual`: partial sums of y's squares; (2, rows, ...): and
            of y itself, for a layer norm.
        counts: (parts,) int64: how many inputs were kept is added to it.
        experts: those of each row. `table` is that of the first one then, and rows of x or y are as `Chosen` has them.
        pdl: launch while the kernel before still runs. That one must not write table, thresholds, norm
            weight or the positions of partials, which are read before the wait for it.
        exclusive_device: the promise that no other product runs on this GPU meanwhile, of another stream or another
            process. Up to 4 programs then share the epilogue of a block; they wait for one another, and two products
            at a time can wait for ever, each for programs that find no room beside the other's. Kernels that
            end by themselves may run beside: they only delay. False needs no promise: one program has the epilogue
            of a block, and waits for none that begins after it.

    Raises:
        ValueError: too many rows, `parts`, `squares` or `config` does not fit, or an activation has no curve.
    """
    partials = x if isinstance(x, AttentionPartials) else None
    source = y if isinstance(x, AttentionPartials) else x  # of y the kernel then takes the dtype only
    rows = source.shape[0] if partials is None else partials.sums.shape[1]
    if experts is not None:
        experts.check(source, y, epilogue)
        rows = 1
    of_thresholds = (rows if experts is None else experts.ids.shape[0], len(parts))
    if thresholds.shape not in (of_thresholds, of_thresholds[1:]) or not thresholds.is_contiguous():
        raise ValueError(f"thresholds of shape {tuple(thresholds.shape)} do not fit {of_thresholds} rows and parts")
    if isinstance(table, Packed) and table.parts != parts:
        raise ValueError(f"parts {parts} do not fit a table of parts {table.parts}")
    if activation in _CURVED and curve is None:
        raise ValueError(f"{activation} needs a curve")
    if epilogue == "paired" and experts is None:
        raise ValueError("a paired product is one of experts")
    sums = squares is not None and squares.dim() == 3
    own_thresholds = thresholds.dim() == 2
    shape = _shape_of(
        table,
        parts,
        rows,
        source.dtype,
        epilogue,
        norm,
        partials,
        activation,
        scale,
        sums,
        added,
        beside,
        experts,
        own_thresholds,
    )
    plan = plan_product(shape, config, device_facts(table.device), exclusive_device=exclusive_device)
    if epilogue == "beside" and (squares is None or squares.shape != (4, plan.squares) or beside is None or rows > 1):
        raise ValueError(f"a product beside the stream is of one row, and needs squares of shape {(4, plan.squares)}")
    of_squares = (rows, plan.squares) if experts is None else (y.shape[0], plan.squares // y.shape[0])
    if epilogue == "residual" and (squares is None or squares.shape[-2:] != of_squares):
        raise ValueError(f"a residual product needs squares of shape {of_squares}")
    part_0, part_1, part_2 = (*parts, 0, 0)[:3]
    entry = {2: torch.int32, 4: torch.int64}[source.itemsize]  # an index beside the value
    launch(
        gemv_kernel,
        plan.grid,
        source,
        None if norm is None else norm_pointers(norm, None if added is None else added.sums),
        None if added is None else _AddedPointers(added.y, added.weight, added.sums, added.stream),
        None if partials is None else _PartialsPointers(partials.sums, partials.logs, partials.positions.longest),
        _TablePointers(table, None, None)
        if isinstance(table, Tensor)
        else _TablePointers(table.words, table.scales, table.zeros),
        thresholds,
        _OutputPointers(
            bias, y, squares, None if beside is None else beside.stream, None if beside is None else beside.weight
        ),
        _MemoryPointers(
            scratch.tensor("partial", plan.partial_sums, torch.int32, EMPTY),
            scratch.tensor(f"inputs {entry}", max(1, plan.list_entries), entry),
            scratch.tensor("counts", 3, torch.int64, 0) if counts is None else counts,
        ),
        None if experts is None else _ExpertPointers(experts.ids, experts.weights),
        curve,
        _Sizes(
            n_in=shape.inputs,
            stride=shape.row_stride,
            part_0=part_0,
            part_1=part_1,
            part_2=part_2,
            inputs_per_chunk=config.inputs_per_chunk,
            n_chunks=plan.grid[1],
            group=shape.group,
            n_squares=max(1, shape.norm_squares),
            eps=0.0 if norm is None else norm.eps,
            window=0 if partials is None else partials.window,
            threshold=activation_threshold,
            scale=scale,
            added_eps=0.0 if added is None else added.eps,
            of_added=1.0 if added is None else added.scale,
            n_parts=len(parts),
            expert_stride=0 if experts is None else experts.stride,
            expert_scales=0 if experts is None else experts.scales,
        ),
        ROWS=rows,
        TILE=plan.tile,
        INPUTS=plan.inputs,
        EPILOGUE=plan.epilogue,
        EXPERTS=NO_EXPERTS if experts is None else experts.constants(epilogue, plan.grid),
        warps=config.warps,
        pdl=pdl,
    )
