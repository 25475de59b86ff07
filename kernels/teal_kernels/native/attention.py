"""Attention over a KV cache, as the native library reads it."""

from torch import Tensor

from teal_kernels.native.header import KEY_BLOCK, Attention, HeadNorms, NormKind
from teal_kernels.native.tensors import DTYPES, floats


def attention_of(
    keys: Tensor,
    values: Tensor,
    *,
    heads: int,
    scale: float,
    rotary: tuple[Tensor, Tensor] | None = None,
    head_norms: tuple[Tensor, Tensor] | None = None,
    head_biases: tuple[Tensor, Tensor] | None = None,
    norm_kind: NormKind = NormKind.RMS_NORM,
    eps: float = 0.0,
    window: int = 0,
    cap: float = 0.0,
    query_scale: Tensor | None = None,
    neighbours: bool = False,
    norms: HeadNorms = HeadNorms.HEADS_FIRST,
    grouped: bool = False,
    clip: float = 0.0,
    keys_as_values: bool = False,
    value_norm: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Attention:
    """Attention over a KV cache.

    Args:
        keys: (sequences, kv_heads, positions / KEY_BLOCK, dim, KEY_BLOCK), contiguous; float32, bfloat16 or float16.
        values: (sequences, kv_heads, positions, dim), contiguous, the dtype of keys.
        heads: of the queries.
        scale: of the scores.
        rotary: cosines and sines, (>= positions, rotated dimensions) each; None for no rotary embedding.
        head_norms: weights of the norms of queries' and of keys' heads, (dim,) of all or (heads, dim), (kv_heads, dim)
            of each; or None.
        head_biases: of those norms, shaped as they are; or None.
        norm_kind: of those norms.
        eps: of those norms.
        window: positions that are seen, the token's own among them; 0 for all.
        cap: scores become cap * tanh(score / cap); 0 for none.
        query_scale: (>= positions,) what queries are multiplied with beside `scale`, or None.
        neighbours: whether the rotary embedding turns neighbours, not the two halves; `rotary` is the same.
        norms: where the norms of heads stand; of all heads at once, the weights are (heads * dim,), (kv_heads * dim,).
        grouped: whether the product before has each key head's queries, key and value side by side.
        clip: what queries, keys and values are clamped to before all else; 0 for nothing.
        keys_as_values: whether values are keys as they come from the product, which then has no values.
        value_norm: weight of the norm of values' heads, as of those of keys; or None.
        bias: (heads, positions) added to the scores of keys, or None.
        sinks: (heads,) scores that count in the sum of the exponentials alone, or None.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a cache that is not contiguous.
    """
    sequences, kv_heads, positions, dim = values.shape
    if keys.shape != (sequences, kv_heads, positions // KEY_BLOCK, dim, KEY_BLOCK) or positions % KEY_BLOCK:
        raise ValueError(f"keys of shape {tuple(keys.shape)} do not fit values of shape {tuple(values.shape)}")
    if keys.dtype != values.dtype or keys.dtype not in DTYPES:
        raise ValueError(f"a KV cache of {keys.dtype} and {values.dtype} is none that the native library reads")
    if not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError("keys and values must be contiguous")
    attention = Attention(
        keys=keys.data_ptr(),
        values=values.data_ptr(),
        positions=positions,
        sequences=sequences,
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        dtype=DTYPES[keys.dtype],
        window=window,
        neighbours=neighbours,
        norms=norms,
        norm_kind=norm_kind,
        grouped=grouped,
        scale=scale,
        eps=eps,
        cap=cap,
        clip=clip,
        keys_as_values=keys_as_values,
    )
    attention.holds = (keys, values)
    if value_norm is not None:
        value_norm = _of_heads(value_norm, kv_heads, dim)
        attention.v_norm = value_norm.data_ptr()
        attention.holds += (value_norm,)
    if bias is not None:
        bias = floats(bias, (heads, positions))
        attention.bias = bias.data_ptr()
        attention.holds += (bias,)
    if sinks is not None:
        sinks = floats(sinks, (heads,))
        attention.sinks = sinks.data_ptr()
        attention.holds += (sinks,)
    if query_scale is not None:
        if len(query_scale) < positions:
            raise ValueError(f"scales of {len(query_scale)} positions are too few for {positions}")
        query_scale = floats(query_scale, query_scale.shape)
        attention.query_scale = query_scale.data_ptr()
        attention.holds += (query_scale,)
    if rotary is not None:
        if rotary[0].shape[0] < positions:
            raise ValueError(f"a rotary embedding of {rotary[0].shape[0]} positions is too short for {positions}")
        cos, sin = (floats(table, rotary[0].shape) for table in rotary)
        attention.cos, attention.sin, attention.rotary = cos.data_ptr(), sin.data_ptr(), cos.shape[1]
        attention.holds += (cos, sin)
    if head_norms is not None:
        q_norm, k_norm = (_of_heads(own, count, dim) for own, count in zip(head_norms, (heads, kv_heads), strict=True))
        attention.q_norm, attention.k_norm = q_norm.data_ptr(), k_norm.data_ptr()
        attention.holds += (q_norm, k_norm)
        if head_biases is not None:
            pairs = zip(head_biases, (heads, kv_heads), strict=True)
            q_bias, k_bias = (_of_heads(own, count, dim) for own, count in pairs)
            attention.q_bias, attention.k_bias = q_bias.data_ptr(), k_bias.data_ptr()
            attention.holds += (q_bias, k_bias)
    return attention


def _of_heads(table: Tensor, heads: int, dim: int) -> Tensor:
    """(heads, dim) of a table for each head or, (dim,), for all; in the order of the heads."""
    return floats(
        (table if table.numel() == heads * dim else table.expand(heads, dim)).reshape(heads, dim), (heads, dim)
    )
