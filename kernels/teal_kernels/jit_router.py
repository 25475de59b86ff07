"""The kernel of `teal_kernels.triton_router`, where it is explained. Triton's language, so not type-checked."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from teal_kernels import launching
from teal_kernels.jit_common import (
    layer_normalised,
    layer_scale,
    look,
    mean_of,
    normalised,
    received,
    rms_scale,
    rounded,
    send,
)

SOFTMAX = tl.constexpr(0)
SPARSEMIXER = tl.constexpr(1)
MOST_COMPARED = tl.constexpr(launching.MOST_COMPARED)


@triton.jit
def _near(logits, top, inside, limit):
    """exp(logits - top) of those that are near to the top, as sparsemixer has it; 0 of others."""
    distance = (top - logits) / tl.maximum(tl.abs(logits), top)
    near = inside & ((distance > limit) == 0)
    return tl.where(near, tl.exp(logits - top), 0.0)


@triton.jit
def router_kernel(
    x_ptr,
    norm,
    weight_ptr,
    bias_ptr,
    logits_ptr,
    ids_ptr,
    weights_ptr,
    aside_share_ptr,
    n_in,
    n_squares,
    eps,
    limit,
    EXPERTS: tl.constexpr,
    ASIDE: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    CHOSEN: tl.constexpr,
    SCORES: tl.constexpr,
    NORMALISED: tl.constexpr,
    NORM: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    CENTRED: tl.constexpr,
    SQUARES: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    PDL: tl.constexpr,
):
    """The logit of one expert and one token a program; the last program of a token chooses.

    Args:
        norm: as in `triton_gemv`, or None.
        logits_ptr: (tokens, EXPERTS) int32: words as `send` fills them.
        ASIDE: whether the last row of weights is the gate of an expert that all tokens have.
    """
    expert = tl.program_id(0)
    token = tl.program_id(1)
    last = EXPERTS - 1
    ins = tl.arange(0, BLOCK_IN)
    inside = ins < n_in
    weight = tl.load(weight_ptr + expert * n_in + ins, mask=inside, other=0.0)
    if NORM:
        of_norm = tl.load(norm.weight + ins, mask=inside, other=0.0)
    if CENTRED:
        to_add = tl.zeros((BLOCK_IN,), tl.float32)
        if norm.bias is not None:
            to_add = tl.load(norm.bias + ins, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    dtype = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + token * n_in + ins, mask=inside, other=0.0)
    if CENTRED:
        squares = norm.squares + token * n_squares
        mean = mean_of(squares + tl.num_programs(1) * n_squares, n_squares, n_in, SQUARES)
        scale = layer_scale(squares, mean, n_squares, n_in, eps, SQUARES)
        x = layer_normalised(x, mean, scale, of_norm, to_add, dtype, PLUS_ONE)
    elif NORM:
        scale = rms_scale(norm.squares + token * n_squares, n_squares, n_in, eps, SQUARES)
        x = normalised(x, scale, of_norm, dtype, PLUS_ONE)
    logit = tl.sum(x.to(tl.float32) * weight.to(tl.float32), axis=0)
    if bias_ptr is not None:
        logit += tl.load(bias_ptr + expert, mask=expert < EXPERTS, other=0.0).to(tl.float32)
    logit = rounded(logit, dtype)
    if ASIDE:
        if expert == EXPERTS:
            tl.store(aside_share_ptr + token, tl.sigmoid(logit))
            return
    of_token = logits_ptr + token * EXPERTS
    send(of_token + expert, logit, expert < EXPERTS)
    if expert < last:
        return

    which = tl.arange(0, BLOCK_EXPERTS)
    there = which < EXPERTS
    bits = look(of_token + which, there)
    logits = received(bits, of_token + which, there)
    # As torch.topk has it a NaN is above all. Ranks are a permutation then, and each place below is written once.
    height = tl.where(there, tl.where(logits == logits, logits, float("inf")), float("-inf"))
    top = tl.max(height, axis=0)
    # The rank of each expert: among equals the one with the lower id comes first.
    if BLOCK_EXPERTS <= MOST_COMPARED:
        above = height[None, :] > height[:, None]
        before = (height[None, :] == height[:, None]) & (which[None, :] < which[:, None])
        rank = tl.sum((above | before).to(tl.int32), axis=1)
    else:  # the square of so many is too much: one after the other, and those that are not chosen have one rank
        rank = tl.full((BLOCK_EXPERTS,), EXPERTS, tl.int32)
        for nth in range(CHOSEN):
            open_to_choice = there & (rank == EXPERTS)
            highest = tl.max(tl.where(open_to_choice, height, float("-inf")), axis=0)
            first_of_them = tl.min(tl.where(open_to_choice & (height == highest), which, EXPERTS), axis=0)
            rank = tl.where(which == first_of_them, nth, rank)
    if SCORES == SOFTMAX:
        share = tl.where(there, tl.exp(logits - top), 0.0)
        total = tl.sum(share, axis=0)
        if NORMALISED:
            total = tl.sum(tl.where(rank < CHOSEN, share, 0.0), axis=0)
        share = share / total
    else:
        first = tl.sum(_near(logits, top, there, limit), axis=0)
        left = there & (rank > 0)
        second_top = tl.max(tl.where(left, height, float("-inf")), axis=0)
        second = tl.sum(_near(logits, second_top, left, limit), axis=0)
        share = tl.where(rank == 0, 1.0 / first, 1.0 / second)
    tl.store(ids_ptr + token * CHOSEN + rank, which, mask=there & (rank < CHOSEN))
    tl.store(weights_ptr + token * CHOSEN + rank, share, mask=there & (rank < CHOSEN))
