"""Attention of a decoded token on a GPU: rotary embedding, cache write and split-KV partials in one launch.

Shapes use B rows (sequences decoded together), A attention heads, K key/value heads, D head size, N cache positions.
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from teal_kernels.launching import HEAD_NORMS, LEAST_TILE, TRITON_MISSING, launch, power_of_two
from teal_kernels.operands import AttentionPartials

if TRITON_MISSING is None:
    from teal_kernels.jit_attention import attention_kernel

_ATTENTION_BLOCK = 64
"""Cache positions that a program takes at a time."""
_ATTENTION_WARPS = 4
_ATTENTION_PROGRAMS = 128
"""Programs to aim for: about one a multiprocessor of the GPUs that this is for."""
_MAX_SPLITS = 16
"""Splits at most: the programs of the product that follows read the partials of all."""


def attention_splits(programs: int) -> int:
    """Splits of the KV cache, for `programs` rows times key/value heads."""
    return max(1, min(_MAX_SPLITS, power_of_two(_ATTENTION_PROGRAMS // programs)))


class HeadConstants(NamedTuple):
    """What attention does with heads, known when the kernel is compiled."""

    group: int
    """Query heads of a key head."""
    size: int
    """D."""
    padded: int
    rotated: int
    """Dimensions of a head that are rotated, the first; 0 for none."""
    neighbours: bool
    norms: int
    """One of `HEAD_NORMS`."""
    own_norms: bool
    """Whether each head has weights of its own in them."""
    centred: bool
    """Whether they are layer norms."""
    norm_biases: bool
    plus_one: bool
    grouped: bool
    capped: bool
    growing: bool
    long_rope: bool
    clipped: bool
    sinks: bool
    alibi: bool
    keys_as_values: bool
    value_norms: bool
    all_queries: int
    """Of a norm of all heads: A D, up to a power of two."""
    all_keys: int


class AttentionNumbers(NamedTuple):
    """What few models have, known when the kernel is launched."""

    cap: float
    growth: float
    every: int
    long_from: int
    angles: int
    """Of one table of cosines."""


class RareOperands(NamedTuple):
    """What fewer models have: a launch of others has none of them, and their kernel no argument for them."""

    sinks: Tensor | None
    alibi: Tensor | None
    q_bias: Tensor | None
    k_bias: Tensor | None
    v_norm: Tensor | None
    clip: float


@dataclass(frozen=True)
class Heads:
    """What happens to the heads of queries and keys before their scores, and to these."""

    norms: str = "heads"
    """What `q_norm` and `k_norm` normalise, one of `HEAD_NORMS`."""
    centred: bool = False
    """Whether those are layer norms, of heads before the rotary embedding."""
    biases: tuple[Tensor, Tensor] | None = None
    """(D,) each: of layer norms of queries and of keys."""
    plus_one: bool = False
    """Whether those norms multiply by 1 + weight."""
    neighbours: bool = False
    """Whether the rotary embedding turns neighbours together, not the two halves; its tables have both angles."""
    grouped: bool = False
    """Whether each key head's queries, key and value lie side by side in the product before."""
    cap: float = 0.0
    """Soft cap of scores; 0 for none."""
    growth: tuple[float, int] | None = None
    """Beta and steps of queries that grow with their positions (Llama 4): by 1 + beta log(1 + position // steps)."""
    long_from: int | None = None
    """Of long rope: the position from which on a step has other angles, which lie behind the first."""
    clip: float = 0.0
    """What queries, keys and values are clamped to as they come; 0 for nothing."""
    sinks: Tensor | None = None
    """(A,) logits that join the denominators of the softmax, and have no values (gpt-oss)."""
    alibi: Tensor | None = None
    """(A, N) float32, contiguous: what is added to the scores of a key's position."""
    keys_as_values: bool = False
    """Whether the product has no values: they are the keys as they come, before norm and rotation."""
    v_norm: Tensor | None = None
    """(D,) weight of an RMS norm of values."""

    @property
    def rare(self) -> RareOperands | None:
        """Those that most models have not."""
        if self.clip == 0.0 and all(own is None for own in (self.biases, self.sinks, self.alibi, self.v_norm)):
            return None
        q_bias, k_bias = self.biases or (None, None)
        return RareOperands(self.sinks, self.alibi, q_bias, k_bias, self.v_norm, self.clip)


def decode_attention(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    partials: AttentionPartials,
    *,
    scale: float,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    heads: Heads = Heads(),
    span: int = 1,
    pdl: bool = False,
) -> None:
    """Rotary embedding, cache write and attention of one new token a row.

    Args:
        qkv: (B, (A + 2K) D): queries, keys, values of the new token, before rotation; (B, (A + K) D) with
            `keys_as_values`.
        keys: (B / span, K, N, D) cache; each row's own position is written. Contiguous.
        values: like keys.
        cos: (N or more, R) of the rotary embedding of the first R dimensions of a head, both halves; with long rope
            (2, positions, R). None for no rotary embedding.
        sin: like cos.
        partials: written; its positions are where the new tokens go.
        scale: of the scores.
        q_norm: weight of a norm of queries, (D,), or (A D,) of all heads at once or of each head's own; None for none.
        k_norm: the same for keys.
        eps: of those norms, and of that of values.
        heads: all else.
        span: rows of one sequence, one behind the other, at positions that follow each other: each row sees keys and
            values of the rows before it.
        pdl: launch while the kernel before still runs. That one may write `qkv`; everything else is
            read before the wait for it.

    Raises:
        ValueError: layer norms of another kind than the kernel has, or ALiBi for another cache.
    """
    sequences, kv_heads, length, dim = keys.shape
    rows = sequences * span
    all_heads = partials.logs.shape[2]
    group = all_heads // kv_heads
    growth, every = heads.growth or (0.0, 1)
    own_norms = q_norm is not None and q_norm.numel() > dim
    if heads.centred and (heads.norms != "heads" or (own_norms and heads.biases is not None)):
        raise ValueError(
            "layer norms are of each head before the rotary embedding, and those of their own have no bias"
        )
    if heads.alibi is not None and heads.alibi.shape != (all_heads, length):
        raise ValueError(
            f"ALiBi of shape {tuple(heads.alibi.shape)} does not fit {all_heads} heads, {length} positions"
        )
    launch(
        attention_kernel,
        (kv_heads, partials.splits, rows),
        qkv,
        qkv if q_norm is None else q_norm,
        qkv if k_norm is None else k_norm,
        qkv if cos is None else cos,
        qkv if sin is None else sin,
        keys,
        values,
        partials.positions.own,
        partials.positions.longest,
        partials.sums,
        partials.logs,
        kv_heads,
        length,
        partials.window,
        scale,
        eps,
        AttentionNumbers(
            heads.cap,
            growth,
            every,
            heads.long_from or 0,
            0 if heads.long_from is None or cos is None else cos[0].numel(),
        ),
        heads.rare,
        PADDED_GROUP=max(LEAST_TILE, power_of_two(group)),
        BLOCK=_attention_block(dim, keys.itemsize),
        SPLITS=partials.splits,
        MULTIPLE=partials.split_multiple,
        SEVERAL_ROWS=rows > 1,
        HEADS=HeadConstants(
            group=group,
            size=dim,
            padded=max(LEAST_TILE, power_of_two(dim)),
            rotated=0 if cos is None else cos.shape[-1],
            neighbours=heads.neighbours,
            norms=HEAD_NORMS["none" if q_norm is None else heads.norms],
            own_norms=own_norms,
            centred=heads.centred and q_norm is not None,
            norm_biases=heads.biases is not None,
            plus_one=heads.plus_one,
            grouped=heads.grouped,
            capped=heads.cap != 0.0,
            growing=heads.growth is not None,
            long_rope=heads.long_from is not None,
            clipped=heads.clip != 0.0,
            sinks=heads.sinks is not None,
            alibi=heads.alibi is not None,
            keys_as_values=heads.keys_as_values,
            value_norms=heads.v_norm is not None,
            all_queries=power_of_two(all_heads * dim),
            all_keys=power_of_two(kv_heads * dim),
        ),
        SPAN=span,
        NEW=1 if span == 1 else max(LEAST_TILE, power_of_two(span)),
        warps=_ATTENTION_WARPS,
        pdl=pdl,
    )


def _attention_block(dim: int, itemsize: int) -> int:
    """Cache positions that a program takes at a time: of wide heads, and of float32, fewer fit registers."""
    narrower = max(1, power_of_two(dim) // 128)
    return max(LEAST_TILE, _ATTENTION_BLOCK // (narrower if itemsize == 2 else 4))
