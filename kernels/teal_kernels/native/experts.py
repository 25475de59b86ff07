"""What the native library reads of mixtures of experts, made of tensors: routers, and the weights of many experts."""

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from math import inf

from torch import Tensor

from teal_kernels.native.structures import (
    Activation,
    Epilogue,
    Product,
    Route,
    Scores,
    Weight,
    product_of,
    weight_of,
)
from teal_kernels.packing import Packed


def route_of(router: Weight, top_k: int, *, scores: Scores, normalised: bool = False, jitter: float = 0.0) -> Route:
    """A choice among experts.

    Args:
        router: of `rows_of`, (experts, hidden).
        top_k: experts of each row.
        scores: how they are chosen and weighted.
        normalised: of softmax, whether the weights of the chosen ones sum to 1.
        jitter: of sparsemixer, half of what counts as near.
    """
    route = Route(router=ctypes.addressof(router), top_k=top_k, scores=scores, normalised=normalised, jitter=jitter)
    route.holds = (router,)
    return route


def weight_of_experts(
    table: Tensor | Packed,
    *,
    bias: Tensor | None = None,
    threshold: float | Sequence[float] = -inf,
    expected: float = 0.0,
    counter: int = -1,
) -> Weight:
    """The weights of one projection of all experts, without a copy of them; the inputs of one behind the other's.

    Args:
        table: (experts, out, in) of float32, bfloat16 or float16, which lies as (experts, in, out). Or codes, whose
            tensors have the experts in front and are contiguous.
        bias: (experts, out), or None.
        threshold: inputs with |x| <= threshold are skipped; minus infinity skips none. Several: one of each level.
        expected: share of the inputs that is expected to be skipped.
        counter: where kept inputs are counted; -1 nowhere.

    Raises:
        ValueError: a table that lies otherwise.
    """
    whole = _one_behind_the_other(table)
    weight = weight_of(whole, threshold=threshold, expected=expected, counter=counter)
    if bias is not None:
        bias = bias.detach().float().contiguous()
        weight.bias = bias.data_ptr()
        weight.holds += (bias,)
    return weight


def _one_behind_the_other(table: Tensor | Packed) -> Tensor | Packed:
    """The tables of all experts as one."""
    if isinstance(table, Packed):
        of_codes = table.words, table.scales, table.zeros
        if not all(tensor is None or tensor.is_contiguous() for tensor in of_codes):
            raise ValueError("codes, scales and zero points of experts must be contiguous")
        zeros = None if table.zeros is None else table.zeros.flatten(0, 1)
        return replace(table, words=table.words.flatten(0, 1), scales=table.scales.flatten(0, 1), zeros=zeros)
    by_input = table.transpose(1, 2)
    if not by_input.is_contiguous():
        raise ValueError(f"experts with strides {table.stride()} are not input-major")
    return by_input.flatten(0, 1).t()


def product_of_experts(
    weight: Weight,
    experts: int,
    epilogue: Epilogue,
    *,
    activation: Activation = Activation.SILU,
    activation_threshold: float = 0.0,
    alpha: float = 0.0,
    interleaved: bool = False,
) -> Product:
    """The chosen experts' product.

    Args:
        weight: of all experts; of a gated one gate and up side by side.
        experts: how many there are.
        epilogue: gated or residual.
        activation: of a gated one.
        activation_threshold: of that; of a clamped SwiGLU what it clamps to.
        alpha: of a clamped SwiGLU.
        interleaved: whether up of a neuron stands beside its gate.
    """
    product = product_of(
        [weight], epilogue, activation=activation, activation_threshold=activation_threshold, curve=(alpha,)
    )
    product.experts, product.interleaved = experts, interleaved
    return product
