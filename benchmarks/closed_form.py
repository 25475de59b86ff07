"""Corrections of weights in closed form, for what thresholds drop: least squares on a projection's own product.

A projection multiplies x with W; when sparse, it multiplies the kept inputs x_k. A correction D makes
(W + D) x_k like the target, W x: minimum of sum |t - (W + D) x_k|^2 + ridge |D|^2. Prompts run densely under the
corrected weights too, so their rows are in the sum, with x in the place of x_k and W x as the target.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from teal_cli.calibration import histogram
from teal_cli.checkpoint.rules import threshold_rule
from teal_cli.models.architectures import find_projections
from teal_cli.models.block_calls import BlockCall, hooked, recorded
from teal_cli.sparse import SparseLinear, control_of


@dataclass
class Sums:
    """What a correction of one projection needs of text, in float64."""

    kept: Tensor
    """(in, in): sum of x_k x_k^T over sparse rows, and of x x^T over dense ones."""
    missing: Tensor
    """(out, in): sum of r x_k^T, r = target - W x_k, over sparse rows."""
    residual: Tensor
    """(out,): sum of r."""
    rows: int
    """Sparse and dense."""


@dataclass(frozen=True)
class Correction:
    """A kind of correction."""

    kind: str
    """`weights`, `inputs` (a factor an input channel), `outputs` (a factor an output channel) or `vector` (a bias)."""
    ridge: float = 0.1
    """Over the mean of the diagonal of the quadratic form."""
    rank: int = 0
    """Of `weights`: the best of this rank for the inputs that were seen; 0: any."""

    def of(self, weight: Tensor, sums: Sums) -> tuple[Tensor, Tensor | None]:
        """(out, in) to add to a weight, and (out,) to add to the product, or None.

        Args:
            weight: (out, in).
            sums: of its text.
        """
        base, none = weight.double(), torch.zeros_like(weight)
        if self.kind == "vector":
            return none, (sums.residual / (sums.rows * (1 + self.ridge))).to(weight.dtype)
        if self.kind == "outputs":
            energy = ((base @ sums.kept) * base).sum(1)
            factors = (base * sums.missing).sum(1) / (energy + self.ridge * energy.mean())
            return (base * factors[:, None]).to(weight.dtype), None
        if self.kind == "inputs":
            form = (base.T @ base) * sums.kept
            factors = _solved(form, (base * sums.missing).sum(0)[None], self.ridge)[0]
            return (base * factors).to(weight.dtype), None
        found = _solved(sums.kept, sums.missing, self.ridge)
        if self.rank:
            found = _of_rank(found, sums.kept, self.rank)
        return found.to(weight.dtype), None


def _solved(form: Tensor, right: Tensor, ridge: float) -> Tensor:
    """right (form + ridge)^-1, for right of (rows, n)."""
    damped = form + torch.eye(len(form), dtype=form.dtype, device=form.device) * ridge * form.diagonal().mean()
    return torch.cholesky_solve(right.T, torch.linalg.cholesky(damped)).T


def _of_rank(correction: Tensor, kept: Tensor, rank: int) -> Tensor:
    """Of a rank, with the least error on the inputs whose products these are."""
    values, vectors = torch.linalg.eigh(kept)
    root = vectors * values.clamp(min=values.max() * 1e-9).sqrt()
    left, sizes, right = torch.linalg.svd(correction @ root, full_matrices=False)
    short = (left[:, :rank] * sizes[:rank]) @ right[:rank]
    found: Tensor = torch.linalg.solve(root, short, left=False)
    return found


@dataclass(frozen=True)
class Fit:
    """How a model is corrected."""

    correction: Correction
    in_turn: bool = True
    """Whether each site sees what the corrected ones before it give, and its thresholds are set anew by that; else all
    see the sparse network as it was."""
    towards_dense: float = 0.0
    """Targets: 0 the product of the site's own hidden states, 1 that of the dense network's, or between."""
    parts: tuple[str, ...] = ()
    """Projections to correct, by parts of their names; none: all."""


class Fitter:
    """A sparse model that is corrected block by block.

    Args:
        model: with sparse layers and their thresholds; is corrected.
        dense: the model before.
        sequences: (sequences, tokens) int64.
        prefixes: (sequences,) int64: positions that run dense.
        at_once: sequences a pass.
    """

    def __init__(self, model: Any, dense: Any, sequences: Tensor, prefixes: Tensor, *, at_once: int = 8) -> None:
        self.model, self.control = model, control_of(model)
        path = "model.layers"
        self._blocks = list(model.get_submodule(path).children())
        self._dense_blocks = list(dense.get_submodule(path).children())
        self._batches = list(zip(sequences.split(at_once), prefixes.split(at_once), strict=True))
        device = next(dense.parameters()).device
        self._calls: list[list[BlockCall]] = [[] for _ in self._blocks]
        self._dense: list[Tensor] = []
        for ids, _ in self._batches:
            with recorded(self._dense_blocks) as made, torch.no_grad():
                dense.base_model(input_ids=ids.to(device), use_cache=False)
            self._dense.append(made[0].hidden)
            for of_block, call in zip(self._calls, made, strict=True):
                of_block.append(call.without_hidden())
        self._sparse = list(self._dense)
        rows = [torch.arange(ids.shape[1])[None] < prefix[:, None] for ids, prefix in self._batches]
        self._stays = torch.cat([row.flatten() for row in rows]).to(device)
        self._sites: list[list[list[str]]] = []
        for number in range(len(self._blocks)):
            sites: dict[str, list[str]] = {}
            for projection in find_projections(model):
                if projection.name.startswith(f"{path}.{number}."):
                    sites.setdefault(projection.site, []).append(projection.name.removeprefix(f"{path}.{number}."))
            self._sites.append(list(sites.values()))

    @torch.no_grad()
    def run(self, fit: Fit, on_block: Callable[[int], None] = lambda block: None) -> None:
        """Correct all blocks."""
        for number, block in enumerate(self._blocks):
            wanted = self._inputs_of(number, dense=True)
            if not fit.in_turn:
                seen = self._inputs_of(number, dense=False)
                self._step(number)  # what the next block reads, before this one is corrected
            for index, names in enumerate(self._sites[number]):
                own = self._inputs_of(number, dense=False, site=index)[index] if fit.in_turn else seen[index]
                for name in names:
                    self._correct(block.get_submodule(name), name, own, wanted[index], fit)
            if fit.in_turn:
                self._step(number)
            self._dense = [
                call.on(self._dense_blocks[number], hidden)
                for call, hidden in zip(self._calls[number], self._dense, strict=True)
            ]
            on_block(number)

    def _correct(self, layer: Any, name: str, own: Tensor, dense: Tensor, fit: Fit) -> None:
        """One projection: its threshold by what it sees now, then its weight."""
        if not isinstance(layer, SparseLinear) or not layer.rule.expected_sparsity:
            return
        stays = self._stays
        if fit.in_turn:
            counts = histogram.count(own[~stays]).cpu()
            sparsity = layer.rule.expected_sparsity
            layer.set_rule_(threshold_rule(histogram.threshold_for(counts, sparsity), sparsity))
        if fit.parts and not any(part in name for part in fit.parts):
            return
        change, vector = fit.correction.of(layer.weight, self._sums(layer, own, dense, fit.towards_dense))
        layer.weight.data += change
        if vector is not None:
            layer.bias = nn.Parameter(vector if layer.bias is None else layer.bias + vector, requires_grad=False)

    def _sums(self, layer: SparseLinear, own: Tensor, dense: Tensor, towards_dense: float) -> Sums:
        wide: dict[str, Any] = {"dtype": torch.float64, "device": own.device}
        kept = torch.zeros(layer.in_features, layer.in_features, **wide)
        missing, residual = torch.zeros(layer.weight.shape, **wide), torch.zeros(layer.out_features, **wide)
        for x, other, stays in zip(own.split(8192), dense.split(8192), self._stays.split(8192), strict=True):
            x_k = torch.where((x.abs() > layer.threshold) | stays[:, None], x, 0.0)
            gone = torch.where(stays[:, None], 0.0, (x - x_k) + towards_dense * (other - x)) @ layer.weight.T
            kept += x_k.T @ x_k
            missing += gone.T @ x_k
            residual += gone.sum(0)
        return Sums(kept, missing, residual, len(own))

    def _step(self, number: int) -> None:
        self._sparse = [self._sparse_block(number, index) for index in range(len(self._batches))]

    def _sparse_block(self, number: int, batch: int) -> Tensor:
        ids, prefix = self._batches[batch]
        with self.control.masked(prefix.to(self._stays.device)):
            self.control.begin_pass(self.model, (ids,), {})  # a block is called without its model, whose hook does it
            return self._calls[number][batch].on(self._blocks[number], self._sparse[batch])

    def _inputs_of(self, number: int, *, dense: bool, site: int | None = None) -> list[Tensor]:
        """(tokens, in) of each site of a block, or of one alone, whose pass ends there."""
        block = (self._dense_blocks if dense else self._blocks)[number]
        found: list[list[Tensor]] = [[] for _ in self._sites[number]]
        places = list(enumerate(self._sites[number])) if site is None else [(site, self._sites[number][site])]
        handles = []
        for index, names in places:

            def seen(module: nn.Module, args: tuple[Any, ...], index: int = index) -> None:
                found[index].append(args[0].flatten(0, -2))
                if site is not None:
                    raise _SeenError

            handles.append(block.get_submodule(names[0]).register_forward_pre_hook(seen))
        with hooked(handles):
            for batch, call in enumerate(self._calls[number]):
                with _until_seen():
                    if dense:
                        call.on(block, self._dense[batch])
                    else:
                        self._sparse_block(number, batch)
        return [torch.cat(each) if each else torch.empty(0) for each in found]


class _SeenError(Exception):
    """Ends a pass whose rest nobody needs."""


@contextmanager
def _until_seen() -> Iterator[None]:
    try:
        yield
    except _SeenError:
        return
