"""What counts as a linear layer of a transformers model, and stacked experts as such layers.

transformers keeps the experts of a block as two three-dimensional parameters without modules.
`unstack_experts_` puts modules around these very parameters, so that hooks and sparse layers find
projections there as everywhere else.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LinearShape(NamedTuple):
    """Size of a linear layer."""

    in_features: int
    out_features: int
    copies: int
    """1, or the number of experts that a stacked layer holds."""


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' `Conv1D`: a linear layer whose weight is (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def linear_shape(module: nn.Module) -> LinearShape | None:
    """The size of a module that is a linear layer; None for anything else."""
    if isinstance(module, nn.Linear | StackedLinear):
        return LinearShape(module.in_features, module.out_features, getattr(module, "copies", 1))
    if is_conv1d(module):
        return LinearShape(int(module.nx), int(module.nf), 1)  # type: ignore[arg-type]
    return None


@dataclass(frozen=True)
class Routed:
    """How the rows that a stacked layer is given came to their experts."""

    counts: tuple[int, ...]
    """Rows of each expert; the rows of the first expert come first."""
    rows: Tensor
    """(rows,) int64: which of the (batch * tokens) hidden states each row is."""
    states: int
    """batch * tokens."""

    def positions(self, tokens: int) -> Tensor:
        """(rows,) int64: position of each row in its sequence, of so many in this pass."""
        return self.rows % tokens


def unflattened(x: Tensor, shape: torch.Size | None) -> Tensor:
    """(batch, tokens, in) of a hidden state that may have come as (batch * tokens, in).

    Args:
        x: a hidden state.
        shape: batch and tokens of the pass.
    """
    return x.view(*shape, x.shape[-1]) if x.dim() == 2 and shape is not None else x


def rows_from(start: int, x: Tensor, args: tuple[Any, ...], shape: torch.Size | None) -> Tensor:
    """(rows, in): what belongs to positions from `start` on.

    Args:
        start: leading positions of each sequence that are left out.
        x: a tensor of the shape of a projection's input.
        args: what the projection was called with after its input: a `Routed` for stacked experts.
        shape: batch and tokens of the pass.
    """
    if args and isinstance(args[0], Routed):
        tokens = args[0].states if shape is None else shape[1]
        return x[args[0].positions(tokens) >= start]
    return unflattened(x, shape)[:, start:].flatten(0, -2)


class StackedLinear(nn.Module):
    """The same projection of all experts: weight (experts, out, in)."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.copies, self.out_features, self.in_features = weight.shape
        self.weight = weight

    def forward(self, x: Tensor, routed: Routed) -> Tensor:
        """(rows, in), sorted by expert -> (rows, out)."""
        parts = zip(x.split(list(routed.counts)), self.weight, strict=True)
        return torch.cat([F.linear(part, weight) for part, weight in parts])

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Under transformers' key, which is that of a parameter of the experts."""
        destination[prefix[:-1]] = self.weight if keep_vars else self.weight.detach()


class Experts(nn.Module):
    """Experts of one block, with a module for each projection, computed as transformers does."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.gate_up_proj: nn.Module = StackedLinear(experts.gate_up_proj)  # type: ignore[arg-type]
        self.down_proj: nn.Module = StackedLinear(experts.down_proj)  # type: ignore[arg-type]
        self.act_fn: Any = experts.act_fn
        self.activates_up = bool(getattr(experts, "activates_up", False))
        """Whether up passes the activation too, not the gate alone."""
        self.train(experts.training)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """The parameters come under transformers' keys, as the layers save them."""
        for name in self._modules:
            if f"{prefix}{name}" in state_dict:
                state_dict[f"{prefix}{name}.weight"] = state_dict.pop(f"{prefix}{name}")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(batch * tokens, hidden), with the experts of each row and their weights -> (batch * tokens, hidden)."""
        chosen = top_k_index.flatten()
        order = chosen.argsort(stable=True)
        rows = order // top_k_index.shape[-1]
        counts = chosen.bincount(minlength=self.gate_up_proj.copies).tolist()  # type: ignore[arg-type]
        routed = Routed(tuple(counts), rows, len(hidden_states))
        gate, up = self.gate_up_proj(hidden_states[rows], routed).chunk(2, dim=-1)
        if self.activates_up:
            up = self.act_fn(up)
        output = self.down_proj(self.act_fn(gate) * up, routed)
        output = output * top_k_weights.flatten()[order, None]
        return torch.zeros_like(hidden_states).index_add_(0, rows, output.to(hidden_states.dtype))


def is_stacked(module: nn.Module) -> bool:
    """Whether a module holds experts as transformers stacks them: gate and up in one parameter, down in another."""
    stacks = [module._parameters.get(name) for name in ("gate_up_proj", "down_proj")]
    return all(stack is not None and stack.dim() == 3 for stack in stacks)


def _is_plain(experts: nn.Module) -> bool:
    """Whether `Experts` computes what these do."""
    from transformers.integrations.moe import _default_apply_gate

    wanted = {"has_bias": False, "is_transposed": False, "has_gate": True, "has_post_expert_norm": False}
    alike = all(getattr(experts, name, value) == value for name, value in wanted.items())
    gate = getattr(type(experts), "_apply_gate", _default_apply_gate)
    return alike and gate is _default_apply_gate and hasattr(experts, "act_fn")


def unstack_experts_(model: nn.Module) -> None:
    """Give the projections of stacked experts modules of their own; the parameters are the same, not copied.

    Experts with biases, other layouts or gates than `Experts` computes are left as they are.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if is_stacked(child) and _is_plain(child):
                setattr(parent, name, Experts(child))
