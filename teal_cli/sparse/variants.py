"""Sparse layers of linear layers that are not `nn.Linear`: transformers' Conv1D, and stacked experts."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teal_cli.checkpoint.rules import Dense
from teal_cli.models.layers import Routed, StackedLinear
from teal_cli.sparse.control import SparsityControl
from teal_cli.sparse.linear import SparseLinear
from teal_cli.sparse.site import Site
from teal_kernels import active_inputs, sparse_linear


class SparseConv1D(SparseLinear):
    """In the place of a `Conv1D`, whose weight (in, out) lies as skipping inputs needs it: nothing is moved.

    `weight` is its transpose; checkpoints and state dicts have (in, out) as before.
    """

    @classmethod
    def from_conv1d(cls, conv: nn.Module, *, name: str, control: SparsityControl, site: Site) -> "SparseConv1D":
        """A sparse layer that takes over the parameters of a dense one, without a copy."""
        weight: Tensor = conv.weight  # type: ignore[assignment]
        n_in, n_out = weight.shape
        layer = cls(n_in, n_out, True, name=name, control=control, site=site, device="meta")
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

    def _dense(self, x: Tensor, several: bool) -> Tensor:
        # As Conv1D computes it, so that a prefill has its bits.
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight.t()).view(*x.shape[:-1], self.out_features)


class StackedSite(Site):
    """The hidden states of all experts of a block; one layer reads them."""

    @property
    def side_by_side(self) -> bool:
        """Never: there are as many tables as experts."""
        return False

    @torch.no_grad()
    def lay_out_(self) -> None:
        """Lay every expert's weight out input-major, in one table that takes the place of the old one."""
        for layer in self.layers:
            turned = layer.weight.data.transpose(1, 2)  # (experts, in, out)
            layer.weight.data = turned.contiguous().transpose(1, 2)


class SparseExperts(SparseLinear):
    """In the place of a `StackedLinear`: one plan for all experts, each of which drops inputs of its own rows.

    `weight` is (experts, out, in), saved under the key that transformers has for it.
    """

    def __init__(self, stack: StackedLinear, *, name: str, control: SparsityControl, site: Site) -> None:
        size = stack.in_features, stack.out_features
        super().__init__(*size, False, name=name, control=control, site=site, device="meta")
        self.copies = stack.copies
        self.weight = stack.weight
        self.train(stack.training)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        weight = self.weight if keep_vars else self.weight.detach()
        destination[prefix[:-1]] = weight.contiguous()

    def forward(self, x: Tensor, routed: Routed) -> Tensor:  # type: ignore[override]
        """(rows, in), sorted by expert -> (rows, out)."""
        control = self.control
        dense = not control.enabled or control.mode == "dense" or (control.mode == "auto" and routed.tokens > 1)
        masked = control.mode == "masked"
        counter = control.counter if control.counter is not None and control.counter.active else None
        active: Tensor | None = None
        if not dense and (counter is not None or masked):
            active = (
                active_inputs(x, self.threshold)
                if not isinstance(self.rule, Dense)
                else torch.ones_like(x, dtype=torch.bool)
            )
            sparse_rows = routed.positions >= (control.dense_prefix if masked else 0)
            if counter is not None:
                counted = active[sparse_rows]
                dropped = counted.numel() - counted.count_nonzero()
                counter.add(self.name, self.copies * self.in_features * self.out_features, counted.numel(), dropped)
            active |= ~sparse_rows[:, None]
        plain = dense or masked or isinstance(self.rule, Dense)
        if plain and active is not None:
            x = x * active
        outputs = []
        for part, weight in zip(x.split(list(routed.counts)), self.weight, strict=True):
            if plain or not len(part):
                outputs.append(F.linear(part, weight))
            else:
                outputs.append(sparse_linear(part, weight, None, self.threshold, control.backend))
        return torch.cat(outputs)
