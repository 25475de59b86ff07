"""What counts as a linear layer of a transformers model, and stacked experts as such layers.

transformers keeps the experts of a block as two three-dimensional parameters without modules.
`unstack_experts_` puts modules around these very parameters, so that hooks and sparse layers find
projections there as everywhere else.
"""

from collections.abc import Callable
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


def is_watched(layer: nn.Module) -> bool:
    """Whether hooks, or a forward in the place of its own, are to see what a layer is given, or gives."""
    return bool(layer._forward_pre_hooks or layer._forward_hooks or "forward" in layer.__dict__)


class StackedLinear(nn.Module):
    """The same projection of all experts: weight (experts, out, in).

    Args:
        weight: of all experts.
        transposed: whether it is (experts, in, out), as some families save it.
    """

    def __init__(self, weight: nn.Parameter, *, transposed: bool = False) -> None:
        super().__init__()
        self.transposed = transposed
        if transposed:
            weight = nn.Parameter(weight.data.transpose(1, 2), weight.requires_grad)
        self.copies, self.out_features, self.in_features = weight.shape
        self.weight = weight

    def is_plain_for(self, states: int) -> bool:
        """Whether nobody but the product needs what this layer is given, in a pass of (batch * tokens) states."""
        return not is_watched(self)

    def forward(self, x: Tensor, routed: Routed) -> Tensor:
        """(rows, in), sorted by expert -> (rows, out)."""
        parts = zip(x.split(list(routed.counts)), self.weight, strict=True)
        return torch.cat([F.linear(part, weight) for part, weight in parts])

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Under transformers' key, which is that of a parameter of the experts."""
        weight = self.weight if keep_vars else self.weight.detach()
        destination[prefix[:-1]] = weight.transpose(1, 2).contiguous() if self.transposed else weight


_FUNCTIONS = ("grouped_mm", "batched_mm")
"""Of transformers' functions for experts, those that read of a module what `_Stacks` has."""
_GATHERED_ROWS = 4
"""Rows whose experts compiled code looks up by themselves. More share experts, which a grouped product reads once."""


class _Stacks:
    """What transformers' forward of experts reads of its module: the weights as they are now, and their kind."""

    has_gate, has_bias, is_transposed, is_concatenated, has_post_expert_norm = True, False, False, True, False
    _is_expert_parallel = False

    def __init__(self, experts: "Experts") -> None:
        self.gate_up_proj, self.down_proj = experts.gate_up_proj.weight, experts.down_proj.weight
        self.num_experts = experts.gate_up_proj.copies
        self.act_fn = experts.act_fn
        self._apply_gate = experts.neurons


def _can_be_grouped(weight: Tensor) -> bool:
    """Whether torch's grouped product takes stacked weights (experts, out, in): transformers does not ask.

    Rows of 16 bytes or a multiple, whichever way they lie, and a dtype that it knows.
    """
    aligned = not any(size * weight.element_size() % 16 for size in weight.shape[1:])
    return aligned and weight.dtype in (torch.float32, torch.bfloat16, torch.float16)


def gathered_experts(stacks: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Experts of few rows, each row's own weights times its state: for compiled code only.

    torch's compiler makes one loop of looking the weights up, multiplying and adding, so that they are read once where
    they lie. As it stands it would copy them first.

    Args:
        stacks: of the weights, as transformers' functions take it.
        hidden_states: (rows, hidden).
        top_k_index: (rows, k) int64 experts.
        top_k_weights: (rows, k)

    Returns:
        (rows, hidden)
    """
    rows, k = top_k_index.shape
    chosen = top_k_index.flatten()
    x = hidden_states[:, None].expand(rows, k, -1).flatten(0, 1)  # (rows * k, hidden)
    hidden = stacks._apply_gate(_row_by_row(stacks.gate_up_proj[chosen], x))
    output = _row_by_row(stacks.down_proj[chosen], hidden) * top_k_weights.reshape(-1, 1)
    return output.view(rows, k, -1).sum(1).to(hidden_states.dtype)


def _row_by_row(weight: Tensor, x: Tensor) -> Tensor:
    """(rows, out, in) times (rows, in) -> (rows, out), added up in float32 as a product is."""
    return (weight.float() * x.float()[:, None]).sum(-1).to(x.dtype)


class Experts(nn.Module):
    """Experts of one block, with a module for each projection, computed as transformers does.

    Where no projection skips inputs or is watched, it is transformers' own function that computes them (`grouped_mm`
    where the model's configuration says nothing else), on the same weights: a few launches for all experts, and
    nothing that waits for the device. A layer an expert cost a prompt and a dense step 10 to 60 times the time
    (H200, shapes of Qwen3-MoE and Mixtral, issue 24).
    """

    interleaved = False
    """Whether an output of gate stands beside the one of up, and not all of gate before all of up."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        transposed = bool(getattr(experts, "is_transposed", False))
        self.gate_up_proj: nn.Module = StackedLinear(experts.gate_up_proj, transposed=transposed)  # type: ignore[arg-type]
        self.down_proj: nn.Module = StackedLinear(experts.down_proj, transposed=transposed)  # type: ignore[arg-type]
        self.gate_up_proj_bias: nn.Parameter | None = getattr(experts, "gate_up_proj_bias", None)
        """(experts, out), and that of down."""
        self.down_proj_bias: nn.Parameter | None = getattr(experts, "down_proj_bias", None)
        self.act_fn: Any = getattr(experts, "act_fn", None)
        self.activates_up = bool(getattr(experts, "activates_up", False))
        """Whether up passes the activation too, not the gate alone."""
        self.config: Any = getattr(experts, "config", None)
        """The model's, which names the function; None where transformers has one way only."""
        self.train(experts.training)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """The parameters come under transformers' keys, as the layers save them."""
        for name in self._modules:
            if f"{prefix}{name}" in state_dict:
                weight = state_dict.pop(f"{prefix}{name}")
                turned = getattr(self._modules[name], "transposed", False)
                state_dict[f"{prefix}{name}.weight"] = weight.transpose(1, 2) if turned else weight
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(batch * tokens, hidden), with the experts of each row and their weights -> (batch * tokens, hidden)."""
        together = self._together(len(hidden_states))
        if together is not None:
            output: Tensor = together(_Stacks(self), hidden_states, top_k_index, top_k_weights)
            return output
        chosen = top_k_index.flatten()
        order = chosen.argsort(stable=True)
        rows = order // top_k_index.shape[-1]
        counts = chosen.bincount(minlength=self.gate_up_proj.copies).tolist()  # type: ignore[arg-type]
        routed = Routed(tuple(counts), rows, len(hidden_states))
        both = self.gate_up_proj(hidden_states[rows], routed)
        if self.gate_up_proj_bias is not None:
            both = both + self.gate_up_proj_bias[chosen[order]]
        output = self.down_proj(self.neurons(both), routed)
        if self.down_proj_bias is not None:
            output = output + self.down_proj_bias[chosen[order]]
        output = output * top_k_weights.flatten()[order, None]
        return torch.zeros_like(hidden_states).index_add_(0, rows, output.to(hidden_states.dtype))

    def _together(self, states: int) -> Callable[..., Tensor] | None:
        """transformers' function for all experts together; None where each projection must see its own rows."""
        layers = self.gate_up_proj, self.down_proj
        biased = self.gate_up_proj_bias is not None  # transformers' functions take it in the layout of its own module
        if self.config is None or biased or not all(layer.is_plain_for(states) for layer in layers):  # type: ignore[operator]
            return None
        if torch.compiler.is_compiling() and self.gate_up_proj.weight.is_cuda and states <= _GATHERED_ROWS:
            return gathered_experts
        if not all(_can_be_grouped(layer.weight) for layer in layers):  # type: ignore[arg-type]
            return None
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        name = self.config._experts_implementation
        return ALL_EXPERTS_FUNCTIONS[name] if name in _FUNCTIONS else None

    def neurons(self, both: Tensor) -> Tensor:
        """What down reads, of the outputs of gate and up: (rows, 2 * neurons) -> (rows, neurons)."""
        gate, up = both.chunk(2, dim=-1)
        hidden: Tensor = self.act_fn(gate) * (self.act_fn(up) if self.activates_up else up)
        return hidden


class ClampedExperts(Experts):
    """Those of gpt-oss: (up + 1) * gate * sigmoid(alpha * gate), gate and up clamped and side by side."""

    interleaved = True

    def __init__(self, experts: nn.Module) -> None:
        super().__init__(experts)
        self.alpha, self.limit = float(experts.alpha), float(experts.limit)  # type: ignore[arg-type]

    def neurons(self, both: Tensor) -> Tensor:
        """As `Experts.neurons`."""
        gate, up = both[..., ::2].clamp(max=self.limit), both[..., 1::2].clamp(-self.limit, self.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))


def is_stacked(module: nn.Module) -> bool:
    """Whether a module holds experts as transformers stacks them: gate and up in one parameter, down in another."""
    stacks = [module._parameters.get(name) for name in ("gate_up_proj", "down_proj")]
    return all(stack is not None and stack.dim() == 3 for stack in stacks)


def _kind_of(experts: nn.Module) -> type[Experts] | None:
    """What computes what these do; None where nothing here does."""
    from transformers.integrations.moe import _default_apply_gate
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    if isinstance(experts, GptOssExperts):
        return ClampedExperts

    wanted = {"has_bias": False, "is_transposed": False, "has_gate": True, "has_post_expert_norm": False}
    alike = all(getattr(experts, name, value) == value for name, value in wanted.items())
    gate = getattr(type(experts), "_apply_gate", _default_apply_gate)
    return Experts if alike and gate is _default_apply_gate and hasattr(experts, "act_fn") else None


def unstack_experts_(model: nn.Module) -> None:
    """Give the projections of stacked experts modules of their own; the parameters are the same, not copied.

    Experts with biases, other layouts or gates than `Experts` computes are left as they are.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if is_stacked(child) and (kind := _kind_of(child)) is not None:
                setattr(parent, name, kind(child))
