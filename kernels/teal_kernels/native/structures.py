"""What the native library reads, made of tensors.

A structure points into tensors. What it points to is kept alive by the structure itself (`holds`), so who holds a
program holds all of it.
"""

import ctypes
from collections.abc import Sequence
from itertools import accumulate
from math import inf

import torch
from torch import Tensor

from teal_kernels.native.attention import attention_of
from teal_kernels.native.header import (
    ABI,
    KEY_BLOCK,
    MAX_PARTS,
    MAX_ROWS,
    Activation,
    Attention,
    Dtype,
    Epilogue,
    HeadNorms,
    Layout,
    Norm,
    NormKind,
    Product,
    Program,
    Route,
    Router,
    Scores,
    Step,
    StepKind,
    Weight,
)
from teal_kernels.native.tensors import DTYPES, address, floats, pointer
from teal_kernels.packing import Packed

__all__ = [
    "ABI",
    "DTYPES",
    "KEY_BLOCK",
    "MAX_PARTS",
    "MAX_ROWS",
    "Activation",
    "Attention",
    "Dtype",
    "Epilogue",
    "HeadNorms",
    "Layout",
    "Norm",
    "NormKind",
    "Product",
    "Program",
    "Route",
    "Router",
    "Scores",
    "Step",
    "StepKind",
    "Weight",
    "attention_of",
    "halves_of",
    "no_norm",
    "norm_of",
    "product_of",
    "program_of",
    "router_of",
    "rows_of",
    "weight_of",
]


def weight_of(
    table: Tensor | Packed,
    *,
    part: int = 0,
    bias: Tensor | None = None,
    threshold: float | Sequence[float] = -inf,
    expected: float = 0.0,
    counter: int = -1,
) -> Weight:
    """The weights of one projection, without a copy of them.

    Args:
        table: (out, in) of float32, bfloat16 or float16: input-major with any distance between the rows, so that
            columns of a larger table will do, or row-major. Or codes.
        part: which projection, where codes of several lie side by side.
        bias: (out,), or None.
        threshold: inputs with |x| <= threshold are skipped; minus infinity skips none. Several: one of each level, of
            which each row has one.
        expected: share of the inputs that is expected to be skipped.
        counter: where kept inputs are counted; -1 nowhere.

    Raises:
        ValueError: a table of another dtype or layout, not on the CPU, or a bias that does not fit.
    """
    if table.device.type != "cpu":
        raise ValueError(f"the native library reads weights on the CPU, not on {table.device}")
    weight = _of_codes(table, part) if isinstance(table, Packed) else _offloats(table)
    if bias is not None:
        bias = floats(bias, (weight.outputs,))
        weight.bias = bias.data_ptr()
        weight.holds += (bias,)
    weight.expected, weight.counter = expected, counter
    of_levels = [threshold] if isinstance(threshold, float) else list(threshold)
    weight.threshold = of_levels[0]
    if len(set(of_levels)) > 1:
        table = torch.tensor(of_levels, dtype=torch.float32)
        weight.thresholds, weight.levels = table.data_ptr(), len(of_levels)
        weight.holds += (table,)
    return weight


def rows_of(table: Tensor, bias: Tensor | None = None) -> Weight:
    """The weights of a router or of a scale, row-major even where there is one output.

    Args:
        table: (outputs, hidden) of float32, bfloat16 or float16, contiguous.
        bias: (outputs,), or None.

    Raises:
        ValueError: a table that lies otherwise.
    """
    if not table.is_contiguous():
        raise ValueError(f"a table with strides {table.stride()} is not row-major")
    weight = weight_of(table, bias=bias)
    weight.layout, weight.row_bytes = Layout.ROW_MAJOR, table.shape[1] * table.itemsize
    return weight


def halves_of(weight: Weight) -> tuple[Weight, Weight]:
    """The first and the second half of a projection's outputs, without a copy; the first one counts.

    Raises:
        ValueError: an odd number of outputs, or codes of 4 bits whose second half does not begin at a byte.
    """
    half, rest = divmod(weight.outputs, 2)
    if rest or (weight.dtype == Dtype.INT4 and half % 2):
        raise ValueError(f"{weight.outputs} outputs cannot be divided into halves")
    bits = {Dtype.F32: 32, Dtype.INT8: 8, Dtype.INT4: 4}.get(Dtype(weight.dtype), 16)
    first, second = Weight.from_buffer_copy(weight), Weight.from_buffer_copy(weight)
    first.outputs = second.outputs = half
    second.data += half * weight.row_bytes if weight.layout == Layout.ROW_MAJOR else half * bits // 8
    if weight.bias is not None:
        second.bias += half * ctypes.sizeof(ctypes.c_float)
    if weight.scales is not None:
        second.scales += half * (2 if weight.scale_dtype == Dtype.F16 else 4)
    if weight.zeros is not None:
        second.zeros += half * 2
    second.counter = -1
    first.holds = second.holds = weight.holds
    return first, second


def no_norm() -> Norm:
    """What stands for a norm where a product reads the residual stream as it is."""
    return Norm(kind=NormKind.NO_NORM)


def norm_of(weight: Tensor, eps: float, *, bias: Tensor | None = None, kind: NormKind = NormKind.RMS_NORM) -> Norm:
    """A norm of the residual stream, or of what is added to it.

    Args:
        weight: (hidden,), what the normed state is multiplied with.
        eps: added to the variance.
        bias: (hidden,), or None.
        kind: of the norm.

    Raises:
        ValueError: weight and bias do not fit each other.
    """
    weight = floats(weight, (weight.numel(),))
    held = (weight, None if bias is None else floats(bias, weight.shape))
    norm = Norm(weight=weight.data_ptr(), bias=pointer(held[1]), eps=eps, kind=kind)
    norm.holds = held
    return norm


def product_of(
    parts: Sequence[Weight],
    epilogue: Epilogue,
    *,
    activation: Activation = Activation.SILU,
    activation_threshold: float = 0.0,
    curve: Sequence[float] = (),
    norm: Norm | None = None,
    input_norm: Norm | None = None,
    router: Router | None = None,
) -> Product:
    """Projections that read one hidden state; the epilogue says what becomes of them.

    `curve`: three numbers of XIELU. `norm`: of what a residual product gives, before it is added; `input_norm`: of what
    it reads. `router`: of a routed one.

    Raises:
        ValueError: no part, or more than MAX_PARTS.
    """
    if not 1 <= len(parts) <= MAX_PARTS:
        raise ValueError(f"a product has 1 to {MAX_PARTS} parts, not {len(parts)}")
    product = Product(
        n_parts=len(parts), epilogue=epilogue, activation=activation, activation_threshold=activation_threshold
    )
    for index, part in enumerate(parts):
        product.parts[index] = part
    product.curve[: len(curve)] = curve
    product.holds = (*parts, norm, input_norm, router)
    product.norm, product.input_norm, product.router = address(norm), address(input_norm), address(router)
    return product


def router_of(first: Tensor | None, weight: Tensor, bias: Tensor, group: int, *, whole: bool) -> Router:
    """What chooses groups of neurons.

    Args:
        first: (rank, hidden), contiguous, of a first layer with ReLU behind it; None for none.
        weight: (groups, rank or hidden), contiguous.
        bias: (groups,)
        group: neurons of each.
        whole: whether all neurons are computed, and those of groups that were left out set to zero.

    Raises:
        ValueError: a table that lies otherwise, or not on the CPU.
    """
    layers = [None if first is None else rows_of(first), rows_of(weight, bias)]
    router = Router(first=address(layers[0]), logits=address(layers[1]), group=group, whole=whole)
    router.holds = tuple(layers)
    return router


def program_of(
    steps: Sequence[Norm | Product | Attention | Route],
    *,
    embedding: Weight,
    output: Product,
    norm: Norm | None = None,
    embedding_norm: Norm | None = None,
    position_embedding: Weight | None = None,
    position_offset: int = 0,
    embedding_scale: float = 1.0,
    logits_scale: float = 1.0,
    logits_cap: float = 0.0,
    counters: int = 0,
) -> Program:
    """A decoder.

    Args:
        steps: of all blocks, one after the other.
        embedding: row-major, (vocabulary, hidden).
        output: one plain part, (vocabulary, hidden).
        norm: the last one, or None.
        embedding_norm: of what embeddings are, or None.
        position_embedding: learned, row-major, (positions, hidden); or None.
        position_offset: added to a position before position_embedding is read.
        embedding_scale: what the token's embedding is multiplied with.
        logits_scale: what logits are multiplied with.
        logits_cap: logits then become cap * tanh(logit / cap); 0 for none.
        counters: how many numbers of kept inputs there are.
    """
    kinds = {
        Norm: StepKind.NORM,
        Product: StepKind.PRODUCT,
        Attention: StepKind.ATTENTION,
        Route: StepKind.ROUTE,
    }
    array = (Step * len(steps))(*(Step(of=ctypes.addressof(step), kind=kinds[type(step)]) for step in steps))
    program = Program(
        steps=ctypes.addressof(array),
        embedding=address(embedding),
        position_embedding=address(position_embedding),
        embedding_norm=address(embedding_norm),
        norm=address(norm),
        output=address(output),
        position_offset=position_offset,
        n_steps=len(steps),
        hidden=embedding.inputs,
        counters=counters,
        embedding_scale=embedding_scale,
        logits_scale=logits_scale,
        logits_cap=logits_cap,
    )
    program.vocabulary = output.parts[0].outputs
    program.holds = (array, *steps, embedding, position_embedding, embedding_norm, norm, output)
    return program


def _offloats(table: Tensor) -> Weight:
    if table.dim() != 2 or table.dtype not in DTYPES:
        raise ValueError(f"a weight of shape {tuple(table.shape)} and {table.dtype} is none that the library reads")
    outputs, inputs = table.shape
    # A dimension of size 1 has no distance to speak of.
    if table.stride(0) == 1 or outputs == 1:
        layout, stride = Layout.INPUT_MAJOR, table.stride(1)
    elif table.stride(1) == 1 or inputs == 1:
        layout, stride = Layout.ROW_MAJOR, table.stride(0)
    else:
        raise ValueError(f"a weight with strides {table.stride()} is neither input-major nor row-major")
    weight = Weight(
        data=table.data_ptr(),
        row_bytes=stride * table.itemsize,
        inputs=inputs,
        outputs=outputs,
        dtype=DTYPES[table.dtype],
        layout=layout,
    )
    weight.holds = (table,)
    return weight


def _of_codes(packed: Packed, part: int) -> Weight:
    words, per_word = packed.words, 32 // packed.bits
    first_word = [0, *accumulate(-(-outputs // per_word) for outputs in packed.parts)][part]
    first, outputs = sum(packed.parts[:part]), packed.parts[part]
    if words.stride(1) != 1:
        raise ValueError(f"words with strides {words.stride()} do not lie side by side")
    scale_dtype = packed.scales.dtype if packed.scales.dtype == torch.float16 else torch.float32
    scales = _columns(packed.scales, first, outputs, scale_dtype)
    zeros = None if packed.zeros is None else _columns(packed.zeros, first, outputs, torch.float16)
    weight = Weight(
        data=words.data_ptr() + first_word * words.itemsize,
        scales=scales.data_ptr(),
        zeros=pointer(zeros),
        row_bytes=words.stride(0) * words.itemsize,
        scale_stride=scales.stride(0),
        zero_stride=0 if zeros is None else zeros.stride(0),
        inputs=words.shape[0],
        outputs=outputs,
        dtype=Dtype.INT8 if packed.bits == 8 else Dtype.INT4,
        layout=Layout.INPUT_MAJOR,
        scale_dtype=DTYPES[scale_dtype],
        group=packed.group,
    )
    weight.holds = (words, scales, zeros)
    return weight


def _columns(table: Tensor, first: int, count: int, dtype: torch.dtype) -> Tensor:
    columns = table[:, first : first + count].to(dtype)
    return columns if columns.stride(1) == 1 else columns.contiguous()
