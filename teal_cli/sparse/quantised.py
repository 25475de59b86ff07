"""The sparse linear layer whose weights are quantised."""

from typing import Any

import torch
from torch import Tensor, nn

from teal_cli.checkpoint.rules import Rule
from teal_cli.schemes import Scheme
from teal_cli.sparse.context import PassContext
from teal_cli.sparse.control import SparsityControl
from teal_cli.sparse.linear import SparseLinear
from teal_cli.sparse.merged import MergedProjections
from teal_kernels import KEEP_ALL
from teal_kernels.packing import Packed, dequantised

_FEW_ROWS = 2
"""Rows for which the codes are multiplied as they are, dense too."""


class Codes(SparseLinear):
    """What sparse layers share that hold codes, scales and zero points in place of `weight`.

    `qweight` (in, words) int32, `scales` (groups, out) and `zeros` (groups, out) float16 are what
    `teal_kernels.packing.Packed` describes; of stacked experts all have the experts in front.
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None
    scheme: Scheme
    compute_dtype: torch.dtype

    def take_codes_(
        self, weight: Tensor, scheme: Scheme, packed: Packed | None, *, copies: tuple[int, ...] = ()
    ) -> None:
        """Hold codes in place of a weight.

        Args:
            weight: (out, in), or of experts; its dtype is the layer's, and its device that of codes to come.
            scheme: bits and groups.
            packed: the codes; None makes room for those of a checkpoint.
            copies: experts, where there are some.
        """
        del self._parameters["weight"]
        self.scheme, self.compute_dtype = scheme, weight.dtype
        n_in, n_out, device = self.in_features, self.out_features, weight.device
        if packed is None:
            groups, of_scales = -(-n_in // scheme.group_of(n_in)), torch.float16 if scheme.group else torch.float32
            packed = Packed(
                torch.zeros(*copies, n_in, -(-n_out * scheme.bits // 32), dtype=torch.int32, device=device),
                torch.zeros(*copies, groups, n_out, dtype=of_scales, device=device),
                torch.zeros(*copies, groups, n_out, dtype=torch.float16, device=device) if scheme.has_zeros else None,
                scheme.bits,
                scheme.group_of(n_in),
                (n_out,),
            )
        self.register_buffer("qweight", packed.words)
        self.register_buffer("scales", packed.scales)
        self.register_buffer("zeros", packed.zeros)

    @property
    def packed(self) -> Packed:
        """Codes, scales and zero points together."""
        group = self.scheme.group_of(self.in_features)
        return Packed(self.qweight, self.scales, self.zeros, self.scheme.bits, group, (self.out_features,))

    @property
    def storage(self) -> Tensor:
        """What the weights are held in."""
        return self.qweight

    def _apply(self, fn: Any, recurse: bool = True) -> "Codes":
        kept = {"scales": self.scales, "zeros": self.zeros}
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=self.qweight.device)).dtype
        super()._apply(fn, recurse)
        for name, before in kept.items():  # a cast of the model must not round them
            if before is not None and getattr(self, name).dtype != before.dtype:
                setattr(self, name, before.to(getattr(self, name).device))
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        for name in ("qweight", "scales", "zeros"):
            if f"{prefix}{name}" in destination:
                destination[f"{prefix}{name}"] = destination[f"{prefix}{name}"].contiguous()


class QuantisedLinear(Codes):
    """A `SparseLinear` that holds codes, scales and zero points in place of `weight`.

    `weight` is made of them whenever it is read, for passes over many tokens.
    """

    def __init__(
        self,
        linear: nn.Linear,
        scheme: Scheme,
        *,
        name: str,
        control: SparsityControl,
        merged: MergedProjections,
        part: int | None = None,
        packed: Packed | None = None,
    ) -> None:
        n_in, n_out = linear.in_features, linear.out_features
        shared: dict[str, Any] = {"name": name, "control": control, "merged": merged, "part": part}
        super().__init__(n_in, n_out, linear.bias is not None, **shared, device="meta")
        self.take_codes_(linear.weight, scheme, packed)
        self.bias = linear.bias
        self._nothing_dropped = torch.tensor(KEEP_ALL)
        self.train(linear.training)

    def hold_(self, words: Tensor, scales: Tensor, zeros: Tensor | None) -> None:
        """Hold these codes, parts of a table, in place of its own."""
        self.qweight, self.scales, self.zeros = words, scales, zeros

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """(out, in) in the model's dtype: a new tensor at every read."""
        return dequantised(self.packed, self.compute_dtype).t()

    def set_rule_(self, rule: Rule) -> None:
        """As for any sparse layer."""
        super().set_rule_(rule)
        self._nothing_dropped = torch.full_like(self.threshold, KEEP_ALL)

    def _dense(self, x: Tensor, context: PassContext, exact: bool) -> Tensor:
        if x.numel() <= _FEW_ROWS * self.in_features:
            return self.merged.packed_product(self, x, context, self.control.backend, self._nothing_dropped)
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)
