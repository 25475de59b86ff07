"""Greedy paths (TEAL, arXiv 2408.14690): block by block, which projection to drop more of next.

A path starts dense. Each step raises the one projection that then leaves the block's output nearest
to dense (squared error). Every step saves the same number of weights, so small projections rise by
more. A path passes through every sparsity of its block: it is walked once for all targets.

Naively a step runs the block once for each projection. Three things make it quick:
- what lies before the projection in question is not run again;
- a projection whose last known increase of the error already loses is not tried again before its
  turn comes (increases grow as more is dropped, so an old one is too small, if anything);
- the first steps, where the error is small, are larger.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from teal_cli.calibration import histogram
from teal_cli.errors import UsageError
from teal_cli.models.architectures import Architecture, Projection, architecture_for
from teal_cli.models.block_calls import BlockCall, recorded
from teal_cli.models.forward import run_text
from teal_cli.models.layers import Routed, unflattened
from teal_cli.models.offload import computing_device
from teal_kernels import active_inputs

STEP = 0.05
"""How much a step raises the largest projection of a block."""
_LARGE_STEP, _LARGE_BELOW = 3, 0.3
"""Steps are three times as large while the block drops less than this."""
_MOST = 0.98
_END = 0.85
"""Sparsity of a block at which its path ends."""


@dataclass
class GreedyPaths:
    """What was found, and what it took."""

    paths: dict[str, Tensor] = field(default_factory=dict)
    """Block -> (points, projections of the block) float32: sparsities, from dense on."""
    forwards: int = 0
    """Runs of a block, in whole or from some projection on."""
    naive_forwards: int = 0
    """What as many steps of the plain size would take, each trying every projection."""


def at_sparsity(path: Sequence[Sequence[float]], parameters: Sequence[int], target: float) -> list[float]:
    """The sparsities of a block's projections where its path reaches the target, in between by a straight line.

    Args:
        path: its points, from dense on.
        parameters: of each projection.
        target: sparsity of the block.

    Raises:
        ValueError: the path ends before.
    """
    reached = [_mean(point, parameters) for point in path]
    after = next((index for index, value in enumerate(reached) if value >= target - 1e-9), None)
    if after is None:
        raise ValueError(f"the path ends at {reached[-1]:.2f}")
    before = max(after - 1, 0)
    span = reached[after] - reached[before]
    share = min((target - reached[before]) / span, 1.0) if span > 0.0 else 0.0
    return [start + (stop - start) * share for start, stop in zip(path[before], path[after], strict=True)]


def _mean(point: Sequence[float], parameters: Sequence[int]) -> float:
    """Sparsity of a block."""
    return sum(s * size for s, size in zip(point, parameters, strict=True)) / sum(parameters)


class _Block:
    """A block that can drop inputs of its projections, and need not compute again what is known.

    Args:
        module: the decoder block.
        projections: its projections.
        sink_tokens: leading positions of each sequence that are not dropped from.
        shape: batch and tokens.
    """

    def __init__(
        self, module: nn.Module, projections: dict[str, nn.Module], sink_tokens: int, shape: torch.Size
    ) -> None:
        self._module, self._projections, self._sinks, self._shape = module, projections, sink_tokens, shape
        self._parts = {
            child: {name for name, projection in projections.items() if projection in set(child.modules())}
            for child in module.children()
        }
        self._thresholds: dict[str, float] = {}
        self._known: dict[object, Any] = {}
        self._fresh: dict[object, Any] = {}
        self._unchanged: set[str] = set()

    def run(self, call: Callable[[], Tensor], thresholds: dict[str, float], unchanged: set[str]) -> Tensor:
        """The output of `call`, which runs the block.

        Args:
            call: the block on its inputs.
            thresholds: projection name -> threshold.
            unchanged: projections whose outputs are those that `keep` kept.
        """
        self._thresholds, self._unchanged, self._fresh = thresholds, unchanged, {}
        with ExitStack() as stack:
            for name, module in self._projections.items():
                stack.enter_context(_forward_of(module, self._dropping(name, module.forward)))
            for child, inside in self._parts.items():
                if inside and child not in self._projections.values():
                    stack.enter_context(_forward_of(child, self._remembering(child, inside, child.forward)))
            return call()

    def keep(self) -> None:
        """Remember what the last run computed."""
        self._known |= self._fresh

    def _dropping(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(x: Tensor, *rest: Any) -> Any:
            if name in self._unchanged:
                return self._known[name]
            if self._thresholds[name] > 0.0:
                active = active_inputs(x, torch.tensor(self._thresholds[name], device=x.device))
                if rest and isinstance(rest[0], Routed):
                    tokens = rest[0].states if self._shape is None else self._shape[1]
                    active[rest[0].positions(tokens) < self._sinks] = True
                else:
                    unflattened(active, self._shape)[:, : self._sinks] = True
                x = x * active
            self._fresh[name] = forward(x, *rest)
            return self._fresh[name]

        return run

    def _remembering(self, child: nn.Module, inside: set[str], forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if inside <= self._unchanged:
                return self._known[child]
            self._fresh[child] = forward(*args, **kwargs)
            return self._fresh[child]

        return run


@contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """A module with another forward, for a while."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


class _Walk:
    """The path of one block.

    Args:
        block: that remembers.
        members: its projections, in the order in which a token meets them.
        histograms: of their sites.
        call: runs the block on its inputs.
        error: of an output of the block.
        lazy: see `measure_paths`.
    """

    def __init__(
        self,
        block: _Block,
        members: list[Projection],
        histograms: dict[str, Tensor],
        call: Callable[[], Tensor],
        error: Callable[[Tensor], float],
        lazy: bool,
    ) -> None:
        self._block, self._members, self._histograms = block, members, histograms
        self._call, self._error, self._lazy = call, error, lazy
        self._parameters = [p.weights_read for p in members]
        sites = list(dict.fromkeys(p.site for p in members))
        # What a change of one projection leaves as it is: what is read before it, or beside it.
        self._unchanged = [
            {q.name for q in members if q != p and sites.index(q.site) <= sites.index(p.site)} for p in members
        ]
        self.forwards = self.plain_steps = 0
        self.points = [[0.0] * len(members)]
        self._walk()

    def _run(self, point: list[float], unchanged: set[str]) -> Tensor:
        self.forwards += 1
        thresholds = {
            p.name: histogram.threshold_for(self._histograms[p.site], s)
            for p, s in zip(self._members, point, strict=True)
        }
        return self._block.run(self._call, thresholds, unchanged)

    def output_at(self, target: float) -> Tensor:
        """The block's output with its sparsity at the target."""
        return self._run(at_sparsity(self.points, self._parameters, target), set())

    def _walk(self) -> None:
        sizes = self._parameters
        error = self._error(self._run(self.points[0], set()))
        self._block.keep()
        large = True
        known = [0.0] * len(sizes)  # the last increase of each, for each weight saved
        while (reached := _mean(self.points[-1], sizes)) < _END:
            if large and reached >= _LARGE_BELOW:
                large, known = False, [0.0] * len(sizes)  # a smaller step costs less: ask all again
            steps = _LARGE_STEP if large else 1
            point, error = self._step(error, known, steps)
            self.points.append(point)
            self.plain_steps += steps
            self._block.keep()

    def _step(self, error: float, known: list[float], steps: int) -> tuple[list[float], float]:
        """The next point and its error, as many plain steps on; `known` learns what was tried."""
        sizes, last = self._parameters, self.points[-1]
        raised: dict[int, tuple[list[float], float]] = {}
        latest = -1
        while True:
            open_ = [i for i in range(len(sizes)) if last[i] < _MOST]
            untried = [i for i in open_ if i not in raised]
            best = min(open_, key=lambda i: (known[i], i in untried))
            if best in raised and (self._lazy or not untried):
                break
            best = best if best in untried else untried[0]
            point = list(last)
            point[best] = min(last[best] + STEP * steps * max(sizes) / sizes[best], _MOST)
            found = self._error(self._run(point, self._unchanged[best]))
            known[best] = (found - error) / ((point[best] - last[best]) * sizes[best])
            raised[best], latest = (point, found), best
        point, found = raised[best]
        if latest != best:  # what is remembered must be the chosen one's
            self._run(point, self._unchanged[best])
        return point, found


def require_one_row(architecture: Architecture) -> None:
    """Refuse a model whose blocks are not one row.

    Raises:
        UsageError: an encoder, an encoder-decoder, or a decoder with several rows.
    """
    if not architecture.is_one_decoder:
        raise UsageError(
            "allocation greedy is for decoders with one row of blocks: leave greedy_tokens (flag --greedy-tokens) at 0"
        )


@torch.no_grad()
def measure_paths(
    model: Any,
    projections: list[Projection],
    histograms: dict[str, Tensor],
    sequences: Tensor,
    *,
    sink_tokens: int,
    inputs: Literal["dense", "sparse"] = "dense",
    sparsity: float = 0.5,
    lazy: bool = True,
    on_block: Callable[[int], None] = lambda blocks: None,
) -> GreedyPaths:
    """Walk every block's path.

    Args:
        model: a transformers causal language model in eval mode.
        projections: from `find_projections`.
        histograms: from `collect`; thresholds are their quantiles.
        sequences: (sequences, tokens) int64, run together.
        sink_tokens: leading positions of each sequence that are not dropped from, and not counted.
        inputs: what a block reads: the dense network's hidden states, or those that come out of the
            blocks before when they drop.
        sparsity: at which the blocks before drop, where inputs are sparse.
        lazy: False tries every projection at every step.
        on_block: called with 1 after each block.

    Raises:
        UsageError: what `require_one_row` raises.
    """
    architecture = architecture_for(model)
    require_one_row(architecture)
    (blocks,) = architecture.blocks
    stack: Any = model.get_submodule(blocks)
    device = computing_device(model)
    with recorded(stack) as calls:
        run_text(model, sequences.to(device))
    found = GreedyPaths()
    hidden = calls[0].hidden
    for index, (module, call) in enumerate(zip(stack, calls, strict=True)):
        name = f"{blocks}.{index}"
        members = [p for p in projections if p.name.startswith(f"{name}.")]
        dense = call.on(module, call.hidden)
        reads = call.hidden if inputs == "dense" else hidden

        def run(module: nn.Module = module, call: BlockCall = call, reads: Tensor = reads) -> Tensor:
            return call.on(module, reads)

        def error(output: Tensor, dense: Tensor = dense) -> float:
            return float((output - dense)[:, sink_tokens:].float().square().sum())

        block = _Block(module, {p.name: model.get_submodule(p.name) for p in members}, sink_tokens, sequences.shape)
        walk = _Walk(block, members, histograms, run, error, lazy)
        if inputs == "sparse":
            hidden = walk.output_at(sparsity)
        found.paths[name] = torch.tensor(walk.points)
        found.forwards += walk.forwards
        found.naive_forwards += walk.plain_steps * len(members)
        on_block(1)
    return found
