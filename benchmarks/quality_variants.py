"""Ways to drop the inputs of sparse layers, and a model that runs by one of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from rotated_stream import second_moments
from torch import Tensor

from teal_cli.allocation.fisher import fisher
from teal_cli.calibration import sensitivity
from teal_cli.checkpoint.calibration import Calibration
from teal_cli.sparse import SparseLinear, sparse_layers

PREFIX = 512


@dataclass
class Variant:
    """One way to choose and to make up for what is dropped.

    Each function gets a layer; inputs are (sequences, positions, in).
    """

    name: str
    score: Callable[[SparseLinear, Tensor], Tensor] = lambda layer, x: x.abs()
    per_token: bool = False
    """The lowest scores of each token, rather than those below a threshold."""
    mean: bool = False
    """Dropped inputs become their mean."""
    affine: bool = False
    """Each output is scaled and shifted to what the dense one is on average (least squares)."""
    low_rank: float = 0.0
    """Dropped inputs go through a matrix of low rank that reads this share of the layer's bytes."""
    rotated: tuple[str, ...] = ()
    """Sites whose hidden states are turned into the axes of their covariance first, by a matrix that is read."""
    outside: float = 0.0
    """Sparsity of the output layer's inputs."""
    stream: str = ""
    """How the residual stream of the whole model is turned, in ROTATIONS: by a matrix that the weights absorb."""
    more: float = 0.0
    """Added to the sparsity asked for, where other text than the calibration's drops less than that."""


VARIANTS = [
    Variant("threshold"),
    Variant("WINA: times the norm of the weights", score=lambda layer, x: x.abs() * layer.weight.norm(dim=0)),
    Variant("per-token top-k", per_token=True),
    Variant("mean of dropped inputs", mean=True),
    Variant("outputs scaled and shifted", affine=True),
    Variant("low rank for dropped inputs (R-Sparse)", low_rank=0.05),
    Variant("rotated MLP input (LaRoSA)", rotated=("mlp_input",)),
    Variant("output layer at 25 %", outside=0.25),
    Variant("rotated stream: random axes", stream="random"),
    Variant("rotated stream: principal axes", stream="principal"),
    Variant("rotated stream: principal axes, 3 % more", stream="principal", more=0.03),
    Variant(
        "rotated stream: principal axes, 3 % more, output layer at 25 %", stream="principal", more=0.03, outside=0.25
    ),
]


@dataclass
class Settled:
    """What a variant took from the calibration's text, by layer."""

    thresholds: dict[str, float] = field(default_factory=dict)
    means: dict[str, Tensor] = field(default_factory=dict)
    low_rank: dict[str, Tensor] = field(default_factory=dict)
    lines: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    seen: float = 0.0
    read: float = 0.0


class Trial:
    """A model whose layers run by a variant."""

    def __init__(self, model: Any, calibration: Calibration, text: Tensor) -> None:
        self.model, self.calibration, self.text = model, calibration, text
        self.layers = sparse_layers(model)
        self.site = {p.name: p.site for p in calibration.projections}
        self.control = next(iter(self.layers.values())).control
        self.logits_error = 0.0
        """Of the dense network, relative to what it was before its stream was turned."""

    @cached_property
    def axes(self) -> dict[str, Tensor]:
        """Site of an MLP's input -> axes of the covariance of the dense network's hidden states, smallest first."""
        readers = {self.site[name]: layer for name, layer in self.layers.items() if "mlp_input" in self.site[name]}
        with self.control.switched_off():
            moments = second_moments(self.model, readers, self.text)
        return {site: torch.linalg.eigh(moment)[1] for site, moment in moments.items()}

    def paid(self, variant: Variant, sparsity: dict[str, float]) -> dict[str, float]:
        """The sparsities that leave room for what a variant reads besides."""
        found = dict(sparsity)
        head = self.model.get_output_embeddings().weight.numel()
        weights = {name: layer.weight.numel() for name, layer in self.layers.items()}
        for name, layer in self.layers.items():
            site = self.site[name]
            if site.rpartition(".")[2] in variant.rotated:
                together = sum(weights[n] for n in self.layers if self.site[n] == site)
                found[name] += layer.in_features**2 / together
            found[name] += variant.low_rank
        if variant.outside or variant.more:
            total = sum(weights.values())
            target = sum(s * weights[n] for n, s in found.items()) / total
            found = self.allocated(target + variant.more - variant.outside * head / total, sparsity)
        return {name: min(value, 0.98) for name, value in found.items()}

    def allocated(self, target: float, like: dict[str, float]) -> dict[str, float]:
        """The same kind of allocation at another target."""
        return dict.fromkeys(like, target) if len(set(like.values())) == 1 else fisher(self.calibration, target)

    @contextmanager
    def running(self, variant: Variant, sparsity: dict[str, float], settled: Settled, settling: bool) -> Iterator[None]:
        """Every layer by the variant, from position PREFIX on."""
        for name, layer in self.layers.items():
            vars(layer)["forward"] = self._forward(layer, variant, sparsity[name], settled, settling)
        head = self.model.get_output_embeddings()
        handle = head.register_forward_pre_hook(
            lambda module, args: (self._outside(args[0], variant, settled, settling),)
        )
        try:
            yield
        finally:
            handle.remove()
            for layer in self.layers.values():
                del layer.forward

    def _outside(self, x: Tensor, variant: Variant, settled: Settled, settling: bool) -> Tensor:
        if not variant.outside:
            return x
        if settling:
            settled.thresholds["output"] = _quantile(x.abs(), variant.outside)
        return x * (x.abs() > settled.thresholds["output"])

    def _forward(
        self, layer: SparseLinear, variant: Variant, sparsity: float, settled: Settled, settling: bool
    ) -> Callable[[Tensor], Tensor]:
        name = layer.name
        axes = self.axes.get(self.site[name]) if variant.rotated else None

        def forward(x: Tensor) -> Tensor:
            before, z = x[:, :PREFIX], x[:, PREFIX:]
            z = z if axes is None else z @ axes
            score = variant.score(layer, z)
            if variant.per_token:
                dropped = round(sparsity * score.shape[-1])
                kept = score > score.kthvalue(dropped, dim=-1, keepdim=True)[0] if dropped else score >= 0
            else:
                if settling:
                    settled.thresholds[name] = _quantile(score, sparsity)
                kept = score > settled.thresholds[name]
            settled.seen += layer.weight.numel()
            settled.read += float(kept.float().mean()) * layer.weight.numel()
            lost = z * ~kept
            if settling and variant.mean:
                settled.means[name] = lost.sum((0, 1)) / (~kept).sum((0, 1)).clamp(min=1)
            if settling and variant.low_rank:
                settled.low_rank[name] = _low_rank(layer.weight, lost.flatten(0, 1), variant.low_rank)
            z = z * kept
            if variant.mean:
                z = z + ~kept * settled.means[name]
            z = z if axes is None else z @ axes.T
            y = F.linear(torch.cat([before, z], dim=1), layer.weight, layer.bias)
            if variant.affine:
                if settling:
                    settled.lines[name] = _line(y[:, PREFIX:], F.linear(x[:, PREFIX:], layer.weight, layer.bias))
                scale, shift = settled.lines[name]
                y[:, PREFIX:] = y[:, PREFIX:] * scale + shift
            if variant.low_rank:
                y[:, PREFIX:] += F.linear(lost, settled.low_rank[name])
            return y

        return forward

    @torch.no_grad()
    def losses(self, sequences: Tensor) -> list[float]:
        """Mean loss of each sequence's positions behind the prefix."""
        found = []
        for ids in sequences:
            logits = self.model(input_ids=ids[None], use_cache=False, logits_to_keep=len(ids) - PREFIX).logits[0, :-1]
            found.append(float(F.cross_entropy(logits, ids[PREFIX + 1 :])))
        return found


def _quantile(score: Tensor, sparsity: float) -> float:
    """The score at and below which this share lies."""
    return float(score.flatten().kthvalue(max(1, round(sparsity * score.numel())))[0])


def _line(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift of each channel that bring x nearest to y."""
    x, y = x.flatten(0, 1), y.flatten(0, 1)
    middle = x.mean(0)
    scale = ((x - middle) * y).mean(0) / (x - middle).square().mean(0).clamp(min=1e-12)
    return scale, y.mean(0) - scale * middle


def _low_rank(weight: Tensor, lost: Tensor, share: float) -> Tensor:
    """The matrix of low rank nearest to the weight on what was dropped: (out, in)."""
    values, axes = torch.linalg.eigh(lost.T @ lost)
    root = values.clamp(min=values.max() * 1e-9).sqrt()
    rank = max(1, int(share * weight.numel() / sum(weight.shape)))
    left, scale, right = torch.linalg.svd(weight @ (axes * root), full_matrices=False)
    nearest: Tensor = (left[:, :rank] * scale[:rank]) @ (right[:rank] @ (axes / root).T)
    return nearest


def relinearised(trial: Trial) -> dict[str, Tensor]:
    """Sensitivities of the sparse network as it is: inputs dropped, and their gradients as if they were not."""

    def through(layer: SparseLinear) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            kept = x.abs() > layer.threshold
            kept[:, :4] = True
            # Dropped inputs add nothing, but their gradient is let through.
            return F.linear(x * kept + (x - x.detach()) * ~kept, layer.weight, layer.bias)

        return forward

    for layer in trial.layers.values():
        vars(layer)["forward"] = through(layer)
    try:
        with trial.control.dense():
            batches = trial.text.split(1)
            return sensitivity.measure(trial.model, trial.calibration.projections, batches, sink_tokens=4)
    finally:
        for layer in trial.layers.values():
            del layer.forward
