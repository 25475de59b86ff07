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
    Scores,
    Step,
    StepKind,
    Weight,
)
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
    "weight_of",
]

DTYPES = {torch.float32: Dtype.F32, torch.bfloat16: Dtype.BF16, torch.float16: Dtype.F16}
"""Those of floats, as the header names them."""


def weight_of(
    table: Tensor | Packed,
    *,
    part: int = 0,
    bias: Tensor | None = None,
    threshold: float = -inf,
    expected: float = 0.0,
    counter: int = -1,
) -> Weight:
    """The weights of one projection, without a copy of them.

    Args:
        table: (out, in) of float32, bfloat16 or float16: input-major with any distance between the rows, so that
            columns of a larger table will do, or row-major. Or codes.
        part: which projection, where codes of several lie side by side.
        bias: (out,), or None.
        threshold: inputs with |x| <= threshold are skipped; minus infinity skips none.
        expected: share of the inputs that is expected to be skipped.
        counter: where kept inputs are counted; -1 nowhere.

    Raises:
        ValueError: a table of another dtype or layout, not on the CPU, or a bias that does not fit.
    """
    if table.device.type != "cpu":
        raise ValueError(f"the native library reads weights on the CPU, not on {table.device}")
    weight = _of_codes(table, part) if isinstance(table, Packed) else _of_floats(table)
    if bias is not None:
        bias = _floats(bias, (weight.outputs,))
        weight.bias = bias.data_ptr()
        weight.holds += (bias,)
    weight.threshold, weight.expected, weight.counter = threshold, expected, counter
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
    weight = _floats(weight, (weight.numel(),))
    held = (weight, None if bias is None else _floats(bias, weight.shape))
    norm = Norm(weight=weight.data_ptr(), bias=_pointer(held[1]), eps=eps, kind=kind)
    norm.holds = held
    return norm


def product_of(
    parts: Sequence[Weight],
    epilogue: Epilogue,
    *,
    activation: Activation = Activation.SILU,
    activation_threshold: float = 0.0,
    norm: Norm | None = None,
) -> Product:
    """Projections that read one hidden state; the epilogue says what becomes of them.

    `norm`: of what a residual product gives, before it is added.

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
    product.holds = tuple(parts)
    if norm is not None:
        product.norm = ctypes.addressof(norm)
        product.holds += (norm,)
    return product


def attention_of(
    keys: Tensor,
    values: Tensor,
    *,
    heads: int,
    scale: float,
    rotary: tuple[Tensor, Tensor] | None = None,
    head_norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
    window: int = 0,
    cap: float = 0.0,
    query_scale: Tensor | None = None,
    neighbours: bool = False,
    norms: HeadNorms = HeadNorms.HEADS_FIRST,
    grouped: bool = False,
) -> Attention:
    """Attention over a KV cache.

    Args:
        keys: (rows, kv_heads, positions / KEY_BLOCK, dim, KEY_BLOCK), contiguous; float32, bfloat16 or float16.
        values: (rows, kv_heads, positions, dim), contiguous, the dtype of keys.
        heads: of the queries.
        scale: of the scores.
        rotary: cosines and sines, (>= positions, rotated dimensions) each; None for no rotary embedding.
        head_norms: weights (dim,) of the RMS norms of each query's and each key's head, or None.
        eps: of those norms.
        window: positions that are seen, the token's own among them; 0 for all.
        cap: scores become cap * tanh(score / cap); 0 for none.
        query_scale: (>= positions,) what queries are multiplied with beside `scale`, or None.
        neighbours: whether the rotary embedding turns neighbours, not the two halves; `rotary` is the same.
        norms: where the norms of heads stand; of all heads at once, the weights are (heads * dim,), (kv_heads * dim,).
        grouped: whether the product before has each key head's queries, key and value side by side.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a cache that is not contiguous.
    """
    rows, kv_heads, positions, dim = values.shape
    if keys.shape != (rows, kv_heads, positions // KEY_BLOCK, dim, KEY_BLOCK) or positions % KEY_BLOCK:
        raise ValueError(f"keys of shape {tuple(keys.shape)} do not fit values of shape {tuple(values.shape)}")
    if keys.dtype != values.dtype or keys.dtype not in DTYPES:
        raise ValueError(f"a KV cache of {keys.dtype} and {values.dtype} is none that the native library reads")
    if not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError("keys and values must be contiguous")
    attention = Attention(
        keys=keys.data_ptr(),
        values=values.data_ptr(),
        positions=positions,
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        dtype=DTYPES[keys.dtype],
        window=window,
        neighbours=neighbours,
        norms=norms,
        grouped=grouped,
        scale=scale,
        eps=eps,
        cap=cap,
    )
    attention.holds = (keys, values)
    if query_scale is not None:
        if len(query_scale) < positions:
            raise ValueError(f"scales of {len(query_scale)} positions are too few for {positions}")
        query_scale = _floats(query_scale, query_scale.shape)
        attention.query_scale = query_scale.data_ptr()
        attention.holds += (query_scale,)
    if rotary is not None:
        if rotary[0].shape[0] < positions:
            raise ValueError(f"a rotary embedding of {rotary[0].shape[0]} positions is too short for {positions}")
        cos, sin = (_floats(table, rotary[0].shape) for table in rotary)
        attention.cos, attention.sin, attention.rotary = cos.data_ptr(), sin.data_ptr(), cos.shape[1]
        attention.holds += (cos, sin)
    if head_norms is not None:
        together = norms == HeadNorms.ALL_HEADS
        sizes = (heads * dim, kv_heads * dim) if together else (dim, dim)
        q_norm, k_norm = (_floats(weight, (size,)) for weight, size in zip(head_norms, sizes, strict=True))
        attention.q_norm, attention.k_norm = q_norm.data_ptr(), k_norm.data_ptr()
        attention.holds += (q_norm, k_norm)
    return attention


def program_of(
    steps: Sequence[Norm | Product | Attention | Route],
    *,
    embedding: Weight,
    output: Product,
    norm: Norm | None = None,
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
    parts = (embedding, position_embedding, norm, output)
    at = [None if part is None else ctypes.addressof(part) for part in parts]
    program = Program(
        steps=ctypes.addressof(array),
        embedding=at[0],
        position_embedding=at[1],
        norm=at[2],
        output=at[3],
        position_offset=position_offset,
        n_steps=len(steps),
        hidden=embedding.inputs,
        counters=counters,
        embedding_scale=embedding_scale,
        logits_scale=logits_scale,
        logits_cap=logits_cap,
    )
    program.vocabulary = output.parts[0].outputs
    program.holds = (array, *steps, *parts)
    return program


def _of_floats(table: Tensor) -> Weight:
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
        zeros=_pointer(zeros),
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


def _floats(table: Tensor, shape: Sequence[int]) -> Tensor:
    """As contiguous float32 on the CPU; the tensor itself where it is that."""
    if table.shape != torch.Size(shape):
        raise ValueError(f"{tuple(table.shape)} values do not fit, {tuple(shape)} are needed")
    return table.detach().to("cpu", torch.float32).contiguous()


def _pointer(table: Tensor | None) -> int | None:
    return None if table is None else table.data_ptr()
