"""Sparse matrix-vector products that read only the weights whose inputs matter.

Knows torch and triton, nothing of models. Imports without a GPU and without triton.
"""

from teal_kernels.layout import input_major, is_input_major
from teal_kernels.ops import (
    BACKENDS,
    BackendUnavailableError,
    backend_unavailable_reason,
    resolve_backend,
    sparse_linear,
)
from teal_kernels.reference import KEEP_ALL, active_inputs, masked_input, reference_linear

__all__ = [
    "BACKENDS",
    "KEEP_ALL",
    "BackendUnavailableError",
    "active_inputs",
    "backend_unavailable_reason",
    "input_major",
    "is_input_major",
    "masked_input",
    "reference_linear",
    "resolve_backend",
    "sparse_linear",
]
