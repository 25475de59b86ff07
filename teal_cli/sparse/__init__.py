"""Sparse layers inside transformers models."""

from teal_cli.checkpoint.rules import Dense, Routed, Rule, Threshold, Zeros
from teal_cli.sparse.control import SparsityControl, control_of, use_backend
from teal_cli.sparse.counting import SparsityCounter
from teal_cli.sparse.intrinsic import make_intrinsic_, neuron_sparsity
from teal_cli.sparse.linear import SparseLinear
from teal_cli.sparse.recalibrate import recalibrate_
from teal_cli.sparse.replace import (
    apply_plan_,
    lay_out_,
    replace_projections_,
    set_thresholds_,
    sparse_layers,
    sparsify_,
)

__all__ = [
    "Dense",
    "Routed",
    "Rule",
    "SparseLinear",
    "SparsityControl",
    "SparsityCounter",
    "Threshold",
    "Zeros",
    "apply_plan_",
    "control_of",
    "lay_out_",
    "make_intrinsic_",
    "neuron_sparsity",
    "recalibrate_",
    "replace_projections_",
    "set_thresholds_",
    "sparse_layers",
    "sparsify_",
    "use_backend",
]
