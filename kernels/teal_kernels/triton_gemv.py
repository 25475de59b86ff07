"""Triton backend: a masked matrix-vector product for one decoded token a row.

Each program owns a block of outputs and one stretch of the inputs, and writes one row of float32
partial sums; a second launch-free step (a torch sum) adds the stretches in a fixed order. There are
no atomics and no output to clear, so the same inputs give the same bits on every run. Masks cover
both edges, so any width is right. Importable without triton; without a GPU it runs under
TRITON_INTERPRET=1.
"""

import os
from typing import Any

import torch
from torch import Tensor

from teal_kernels.layout import input_major

try:
    import triton
    import triton.language as tl

    TRITON_MISSING: str | None = None
except ImportError as error:  # pragma: no cover - triton has no wheels for some systems
    triton = None
    TRITON_MISSING = f"triton cannot be imported ({error})"

# A starting point that fits any shape; nothing here is tuned yet.
_BLOCK_OUT = 64
_BLOCK_IN = 64
_INPUTS_PER_SPLIT = 1024


def interpreting() -> bool:
    """True where kernels run in triton's interpreter, on CPU tensors (set before first import)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


if triton is not None:

    @triton.jit
    def _masked_gemv(  # type: ignore[no-untyped-def]
        x_ptr,
        weight_ptr,
        threshold_ptr,
        partial_ptr,
        n_in,
        n_out,
        inputs_per_split,
        BLOCK_OUT: tl.constexpr,
        BLOCK_IN: tl.constexpr,
    ):
        """x (rows, in), weight input-major (in, out), partial (rows, splits, out) in float32."""
        out_block = tl.program_id(0)
        split = tl.program_id(1)
        row = tl.program_id(2)
        n_splits = tl.num_programs(1)
        outs = out_block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        out_inside = outs < n_out
        threshold = tl.load(threshold_ptr)
        first = split * inputs_per_split
        last = tl.minimum(first + inputs_per_split, n_in)
        acc = tl.zeros((BLOCK_OUT,), dtype=tl.float32)
        for start in range(first, last, BLOCK_IN):
            ins = start + tl.arange(0, BLOCK_IN)
            in_inside = ins < last
            x = tl.load(x_ptr + row * n_in + ins, mask=in_inside, other=0.0).to(tl.float32)
            # "not <=" rather than ">": NaN must stay active.
            active = in_inside & ((tl.abs(x) <= threshold) == 0)
            w = tl.load(
                weight_ptr + ins.to(tl.int64)[:, None] * n_out + outs[None, :],
                mask=active[:, None] & out_inside[None, :],
                other=0.0,
            ).to(tl.float32)
            # At an infinite threshold an infinity is dropped, and inf * 0 would be NaN.
            x = tl.where(active, x, 0.0)
            acc += tl.sum(w * x[:, None], axis=0)
        tl.store(partial_ptr + (row * n_splits + split) * n_out + outs, acc, mask=out_inside)


def triton_sparse_linear(x: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor) -> Tensor:
    """Sparse product on a GPU (or in the interpreter); arguments and result as `reference_linear`.

    Accumulates in float32 for float16, bfloat16 and float32 weights.
    """
    n_out, n_in = weight.shape
    rows = x.reshape(-1, n_in).contiguous()
    table = input_major(weight).t()
    n_splits = max(1, -(-n_in // _INPUTS_PER_SPLIT))
    inputs_per_split = -(-n_in // n_splits)
    partial = torch.empty((rows.shape[0], n_splits, n_out), dtype=torch.float32, device=x.device)
    grid = (-(-n_out // _BLOCK_OUT), n_splits, rows.shape[0])
    kernel: Any = _masked_gemv
    kernel[grid](
        rows,
        table,
        threshold,
        partial,
        n_in,
        n_out,
        inputs_per_split,
        BLOCK_OUT=_BLOCK_OUT,
        BLOCK_IN=_BLOCK_IN,
    )
    y = partial.sum(1)
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], n_out)
