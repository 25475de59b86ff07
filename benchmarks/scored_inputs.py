"""Other scores than |x| for what is dropped, as another scale of every input.

A score |x_i| c_i is the magnitude of an input that was scaled by c_i, of a projection whose weights were divided by it,
so thresholds, sensitivities and allocations are measured for it as for any network. Where the projections of a site
share the scale, a norm, `up_proj` or `v_proj` can absorb it and nothing more is read; else it is one number an input.

- WINA (arXiv 2505.19427): c_i is the norm of the weights that read x_i. Its transform turns the inputs of attention and
  of the MLP into the right singular vectors of `k_proj` and `gate_proj`, which makes their columns orthogonal.
- The gradient: c_i is the root mean square of the loss's gradient that reaches x_i through the projection, so that the
  score is what dropping x_i costs to first order, where WINA takes all outputs for equally important.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from teal_cli.calibration import sensitivity
from teal_cli.models.architectures import Projection, architecture_for, find_projections
from teal_cli.sparse import sparse_layers
from teal_cli.sparse.merged import MergedProjections


@dataclass(frozen=True)
class Scored:
    """How one projection's input is changed before it is dropped from; its weights are changed against it."""

    scale: Tensor
    """(in,) float32, behind the turn."""
    turn: Tensor | None = None
    """(in, in) float32, axes as columns."""

    def on(self, x: Tensor) -> Tensor:
        """(..., in) -> the same."""
        return (x if self.turn is None else x @ self.turn) * self.scale


@torch.no_grad()
def rescale_(model: Any, scored: dict[str, Scored]) -> None:
    """Change the weights of a dense model's projections for inputs that `scale_inputs_` scales."""
    for name, score in scored.items():
        layer = model.get_submodule(name)
        weight = layer.weight if score.turn is None else layer.weight @ score.turn
        layer.weight = nn.Parameter(weight / score.scale, requires_grad=False)  # tied embeddings are let go


def scale_inputs_(model: Any, scored: dict[str, Scored]) -> None:
    """Let every named layer, dense or sparse, read its input scaled; hooks come before those that are added later."""
    for name, score in scored.items():
        model.get_submodule(name).register_forward_pre_hook(_hook(score))


def _hook(score: Scored) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    return lambda module, args: (score.on(args[0]), *args[1:])


def apart_(model: Any) -> None:
    """Settle the thresholds of a site's projections each by its own input, where these differ."""
    for layer in sparse_layers(model).values():
        layer.merged = MergedProjections(layer.name)
        layer.part = layer.merged.add(layer, None)


def right_singular(model: Any, ends: tuple[str, ...]) -> dict[str, Tensor]:
    """Path of each block's norm-fed layer -> right singular vectors of the first layer named so, (in, in)."""
    found = {}
    for name, module in model.named_modules():
        if name.endswith(ends):
            moment = module.weight.double().T @ module.weight.double()
            found[name] = torch.linalg.eigh(moment)[1].to(module.weight)
    return found


def turns_of_sites(model: Any, projections: list[Projection]) -> dict[str, Tensor]:
    """WINA's transform: projection -> axes of `k_proj` or `gate_proj` of its block, of those that read a norm."""
    site = {p.name: p.site for p in projections}
    axes = {site[name]: turn for name, turn in right_singular(model, ("k_proj", "gate_proj")).items()}
    return {name: axes[where] for name, where in site.items() if where in axes}


def column_norms(model: Any, turns: dict[str, Tensor]) -> dict[str, Tensor]:
    """Projection -> (in,): norms of the weights that read each input."""
    found = {}
    for projection in find_projections(model, output_layer=None):
        weight = model.get_submodule(projection.name).weight.detach().float()
        found[projection.name] = (weight @ turns[projection.name] if projection.name in turns else weight).norm(dim=0)
    return found


@torch.enable_grad()
def gradients(model: Any, text: Tensor, *, sink_tokens: int) -> dict[str, Tensor]:
    """Projection -> (in,): root mean square of the loss's gradient that reaches each input through it."""
    projections = find_projections(model, output_layer=None)
    path = architecture_for(model).blocks[0]
    squares: dict[str, Tensor] = {}
    with sensitivity._frozen(model):
        for ids in text.split(1):
            for states in sensitivity._by_block(model, path, projections, ids.to(model.device)):
                for name, state in states.items():
                    found = state.gradient[:, sink_tokens:].float().square().sum((0, 1))
                    squares[name] = squares.get(name, torch.zeros_like(found)) + found
    return {name: each.sqrt() for name, each in squares.items()}


def shared_by_site(scales: dict[str, Tensor], projections: list[Projection]) -> dict[str, Tensor]:
    """One scale a site: the root of the sum of squares of its projections'."""
    squares: dict[str, Tensor] = {}
    for p in projections:
        squares[p.site] = squares.get(p.site, torch.zeros_like(scales[p.name])) + scales[p.name].square()
    return {p.name: squares[p.site].sqrt() for p in projections}


def absorbable(scales: dict[str, Tensor], projections: list[Projection], model: Any) -> dict[str, Tensor]:
    """Scales that weights in front can absorb: one a site, and one for the query heads that share a value head."""
    found = shared_by_site(scales, projections)
    config = model.config
    groups = config.num_attention_heads // config.num_key_value_heads
    for p in projections:
        if p.site.endswith("attention_output"):
            heads = found[p.name].square().view(config.num_key_value_heads, groups, -1)
            found[p.name] = heads.mean(1, keepdim=True).expand_as(heads).sqrt().flatten()
    return found


def scored(scales: dict[str, Tensor], turns: dict[str, Tensor], power: float = 1.0) -> dict[str, Scored]:
    """Scales around 1, so that inputs keep their order of magnitude."""
    found = {}
    for name, scale in scales.items():
        scale = scale.detach().double()
        logs = scale.clamp(min=float(scale.max()) * 1e-6).log() * power
        found[name] = Scored((logs - logs.mean()).exp().float(), turns.get(name))
    return found
