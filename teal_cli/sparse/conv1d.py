"""The sparse layer of transformers' Conv1D, a linear layer whose weight is (in, out)."""

from typing import Any

import torch
from torch import Tensor, nn

from teal_cli.sparse.context import PassContext
from teal_cli.sparse.control import SparsityControl
from teal_cli.sparse.linear import SparseLinear
from teal_cli.sparse.merged import MergedProjections


class SparseConv1D(SparseLinear):
    """In the place of a `Conv1D`, whose weight (in, out) lies as skipping inputs needs it: nothing is moved.

    `weight` is its transpose; checkpoints and state dicts have (in, out) as before.
    """

    @classmethod
    def from_conv1d(
        cls, conv: nn.Module, *, name: str, control: SparsityControl, merged: MergedProjections
    ) -> "SparseConv1D":
        """A sparse layer that takes over the parameters of a dense one, without a copy."""
        weight: Tensor = conv.weight  # type: ignore[assignment]
        n_in, n_out = weight.shape
        layer = cls(n_in, n_out, True, name=name, control=control, merged=merged, device="meta")
        layer.weight = nn.Parameter(weight.detach().t(), requires_grad=weight.requires_grad)
        layer.bias = conv.bias  # type: ignore[assignment]
        layer.train(conv.training)
        return layer

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = destination[f"{prefix}weight"].t().contiguous()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        key = f"{prefix}weight"
        turned = {key: state_dict[key].t()} if key in state_dict else {}
        super()._load_from_state_dict({**state_dict, **turned}, prefix, *args)

    def _dense(self, x: Tensor, context: PassContext, exact: bool) -> Tensor:
        # As Conv1D computes it, so that a prefill has its bits.
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight.t()).view(*x.shape[:-1], self.out_features)
