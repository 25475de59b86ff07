"""The sparse layer of stacked experts: the same projection of all experts of a block."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from teal_cli.models.layers import Routed, StackedLinear, is_watched
from teal_cli.sparse.context import decide
from teal_cli.sparse.control import SparsityControl
from teal_cli.sparse.linear import SparseLinear
from teal_cli.sparse.merged import MergedProjections
from teal_kernels import active_inputs, sparse_linear
from teal_kernels.packing import Packed


class ExpertTables(MergedProjections):
    """The weights of all experts of a block, which one layer holds: a table an expert."""

    @property
    def one_table(self) -> bool:
        """Never: there are as many tables as experts."""
        return False

    @torch.no_grad()
    def lay_out_(self) -> None:
        """Lay every expert's weight out input-major, in one table that takes the place of the old one.

        Codes lie so already.
        """
        for layer in self.layers:
            if layer.packed is not None:
                continue
            turned = layer.weight.data.transpose(1, 2)  # (experts, in, out)
            layer.weight.data = turned.contiguous().transpose(1, 2)


class SparseExperts(SparseLinear):
    """In the place of a `StackedLinear`: one rule for all experts, each of which skips inputs of its own rows.

    `weight` is (experts, out, in), saved under the key that transformers has for it.
    """

    def __init__(
        self,
        stack: StackedLinear,
        *,
        name: str,
        control: SparsityControl,
        merged: MergedProjections,
        part: int | None = None,
        chosen: int | None = None,
    ) -> None:
        shared: dict[str, Any] = {"name": name, "control": control, "merged": merged, "part": part}
        super().__init__(stack.in_features, stack.out_features, False, **shared, device="meta")
        self.copies, self.transposed = stack.copies, stack.transposed
        self.weights_read = (stack.copies if chosen is None else chosen) * stack.in_features * stack.out_features
        """By a token that drops no input."""
        self.weight = stack.weight
        self.train(stack.training)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        weight = self.weight if keep_vars else self.weight.detach()
        destination[prefix[:-1]] = (weight.transpose(1, 2) if self.transposed else weight).contiguous()

    def is_plain_for(self, states: int) -> bool:
        """As for a `StackedLinear`; a layer that skips inputs, or counts those that it could, must see them."""
        context = self.control.context or self.control.context_of(1, states)
        counted = context.counter is not None and context.may_drop(states)
        return not counted and decide(self.rule, context, states) == "dense" and not is_watched(self)

    def forward(self, x: Tensor, routed: Routed) -> Tensor:  # type: ignore[override]
        """(rows, in), sorted by expert -> (rows, out). Outside of a pass, all rows are taken for one sequence."""
        control = self.control
        context = control.context or control.context_of(1, routed.states)
        decision = decide(self.rule, context, routed.states)
        if decision == "masked" or (context.counter is not None and context.may_drop(routed.states)):
            may_drop = context.expert_rows_that_drop(routed.rows)
            active = torch.ones_like(x, dtype=torch.bool)
            if decision != "dense":
                active = active_inputs(x, self.threshold) | ~may_drop[:, None]
            if context.counter is not None:
                dropped = active.numel() - active.count_nonzero()
                seen = int(may_drop.count_nonzero()) * self.in_features
                context.counter.add(self.name, self.weights_read, seen, dropped)
            if decision == "masked":
                x = x * active
        parts = enumerate(x.split(list(routed.counts)))
        return torch.cat([self._product(nth, part, skip=decision == "skip") for nth, part in parts if len(part)])

    @property
    def table(self) -> Tensor | Packed:
        """(experts, in, out), or the same of codes (`teal_kernels.experts`)."""
        return self.weight.transpose(1, 2)

    def weight_of(self, nth: int) -> Tensor:
        """(out, in), of one expert."""
        return self.weight[nth]

    def _product(self, nth: int, x: Tensor, *, skip: bool) -> Tensor:
        """Of one expert: (rows, in) -> (rows, out)."""
        if skip:
            return sparse_linear(x, self.weight_of(nth), None, self.threshold, self.control.backend)
        return F.linear(x, self.weight_of(nth))
