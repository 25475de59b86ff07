"""The sparse layer of stacked experts whose weights are quantised."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teal_cli.models.layers import StackedLinear
from teal_cli.schemes import Scheme
from teal_cli.sparse.control import SparsityControl
from teal_cli.sparse.experts import SparseExperts
from teal_cli.sparse.merged import MergedProjections
from teal_cli.sparse.quantised import Codes
from teal_kernels import KEEP_ALL, resolve_backend
from teal_kernels.experts import expert_of
from teal_kernels.packed_linear import reference_packed_linear, triton_packed_linear
from teal_kernels.packing import Packed, dequantised
from teal_kernels.tuning import UNTUNED


class QuantisedExperts(Codes, SparseExperts):
    """`SparseExperts` that hold codes, scales and zero points in place of `weight`, an expert behind the other.

    `qweight` is (experts, in, words) int32, `scales` and `zeros` are (experts, groups, out).
    """

    def __init__(
        self,
        stack: StackedLinear | SparseExperts,
        scheme: Scheme,
        *,
        name: str,
        control: SparsityControl,
        merged: MergedProjections,
        part: int | None = None,
        packed: Packed | None = None,
    ) -> None:
        weights = stack.without_weights() if isinstance(stack, QuantisedExperts) else stack
        super().__init__(weights, name=name, control=control, merged=merged, part=part)  # type: ignore[arg-type]
        if isinstance(stack, SparseExperts):
            self.weights_read = stack.weights_read
        self.take_codes_(weights.weight, scheme, packed, copies=(stack.copies,))

    def without_weights(self) -> StackedLinear:
        """As many experts of this shape and dtype on the meta device, for other codes in the place of these."""
        shape = self.copies, self.out_features, self.in_features
        found = StackedLinear(nn.Parameter(torch.empty(shape, dtype=self.compute_dtype, device="meta"), False))
        found.transposed = self.transposed
        return found

    @property
    def table(self) -> Tensor | Packed:
        """Codes of all experts."""
        return self.packed

    def is_plain_for(self, states: int) -> bool:
        """Never: transformers' function for all experts reads weights, and here are none."""
        return False

    def weight_of(self, nth: int) -> Tensor:
        """(out, in) in the model's dtype, of one expert: a new tensor."""
        return dequantised(expert_of(self.packed, nth), self.compute_dtype).t()

    def _product(self, nth: int, x: Tensor, *, skip: bool) -> Tensor:
        packed = expert_of(self.packed, nth)
        few = len(x) == 1  # then the codes are multiplied as they are, dense too
        if not skip and not few:
            return F.linear(x, dequantised(packed, x.dtype).t())
        threshold = self.threshold if skip else torch.full_like(self.threshold, KEEP_ALL)
        if resolve_backend(self.control.backend, x.device, x.dtype) == "triton":
            return triton_packed_linear(x, packed, None, threshold, replace(UNTUNED, block_in=8))
        return reference_packed_linear(x, packed, None, threshold)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        Codes._save_to_state_dict(self, destination, prefix, keep_vars)
