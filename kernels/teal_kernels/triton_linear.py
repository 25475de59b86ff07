"""Triton backend of `teal::sparse_linear`: one layer's product by itself, for any number of rows."""

from torch import Tensor

from teal_kernels.layout import input_major
from teal_kernels.operands import Scratch
from teal_kernels.triton_gemv import MAX_ROWS, gemv
from teal_kernels.tuning import UNTUNED, choose_config

# The op knows a threshold, not the sparsity that it gives, and must not wait for the device to ask.
_ASSUMED_SPARSITY = 0.5


def triton_sparse_linear(x: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor) -> Tensor:
    """Sparse product on a GPU (or in the interpreter); arguments and result as `reference_linear`.

    Accumulates in float32 for float16, bfloat16 and float32 weights. Deterministic.
    """
    n_out, n_in = weight.shape
    rows = x.reshape(-1, n_in).contiguous()
    y = rows.new_empty(rows.shape[0], n_out)
    table = weight.t() if weight.stride(0) == 1 else input_major(weight).t()
    thresholds = threshold.view(1)
    # Of this call alone: shared scratch would tie streams and captured graphs together.
    scratch = Scratch(x.device)
    for first in range(0, rows.shape[0], MAX_ROWS):
        part = rows[first : first + MAX_ROWS]
        config = choose_config(
            x.device,
            inputs=n_in,
            parts=(n_out,),
            dtype=x.dtype,
            rows=part.shape[0],
            epilogue="plain",
            sparsity=_ASSUMED_SPARSITY,
        )
        if config.dense:  # right for a known sparsity only
            config = UNTUNED
        out = y[first : first + MAX_ROWS]
        gemv(part, table, (n_out,), thresholds, out, config, scratch, bias=bias, exclusive_device=False)
    return y.view(*x.shape[:-1], n_out)
