"""The context of one pass through a model, and the one place that decides whether a layer skips inputs.

A pass is one call of a model. Hooks of the model begin and end it (`sparse.replace` sets them), so every
caller of a model gives its layers a context: transformers' `generate`, the engine, the evaluator. What is
asked of a pass, `SparsityControl` says. A layer that is called outside of a pass goes by the shape of its input.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from teal_cli.checkpoint.rules import Dense, Rule
from teal_cli.sparse.counting import SparsityCounter

Phase = Literal["dense", "decode", "masked"]
"""What a pass is: all dense (a prefill, or sparsity is off), one token a row, or an evaluation by masks."""
Decision = Literal["dense", "masked", "skip"]
"""What a layer does: the plain product, the plain product of masked inputs, or the product that skips inputs."""


@dataclass
class HeldProduct:
    """The product of merged projections, until each part has taken its columns."""

    x: Tensor
    """What it is of."""
    version: int
    """Of x, which counts changes in place."""
    drops: bool
    """Whether inputs were skipped."""
    y: Tensor
    taken: int = 0
    """One bit a part."""


@dataclass
class PassContext:
    """What the layers must know of the pass under way."""

    phase: Phase
    batch: int
    tokens: int
    """Positions of each row in this pass."""
    start: int | Tensor = 0
    """Where masks begin: the first position of this pass at which a row may skip inputs; of all rows, or (batch,)."""
    exact: bool = True
    """Whether dense layers owe the bits of the plain model: in a prefill, and where dense was asked for."""
    counter: SparsityCounter | None = None
    module: nn.Module | None = None
    """Whose call the pass is; None for a layer that was called by itself."""
    outer: "PassContext | None" = None
    """The pass in which this one runs: a model's holds that of its stack of blocks."""
    products: dict[str, HeldProduct] = field(default_factory=dict)
    """Of merged projections, by name."""
    prefixes: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Of rows with prefixes of their own (`_of_prefixes`)."""

    def may_drop(self, rows: int) -> bool:
        """Whether anything of so many rows may be skipped.

        More rows than the batch, while one token a row is decoded, are no step: cross attention reads all states
        of the encoder at once, as one reads a prompt.
        """
        return self.phase == "masked" or (self.phase == "decode" and rows <= self.batch)

    def stays_dense(self, tokens: int, offset: int, device: torch.device) -> Tensor | None:
        """(batch or 1, tokens, 1) bool: which positions of a hidden state must keep all inputs; None for no position.

        Args:
            tokens: positions of each row of the hidden state.
            offset: positions of the pass that come before them.
            device: of the result.
        """
        if isinstance(self.start, Tensor):
            return self._of_prefixes(self.start, tokens, offset, device)[0]
        if self.phase != "masked" or self.start <= offset:
            return None
        return (torch.arange(offset, offset + tokens, device=device) < self.start).view(1, tokens, 1)

    def _of_prefixes(self, start: Tensor, tokens: int, offset: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Where each row has its own prefix: the positions that stay dense, and how many do not; once for all layers.

        The number stays on the device: hundreds of layers ask, and each answer read would wait for the layer before.
        """
        key = (tokens, offset, device)
        if key not in self.prefixes:
            positions = torch.arange(offset, offset + tokens, device=device)
            stays = positions < start.to(device)[:, None]
            self.prefixes[key] = stays.unsqueeze(-1), stays.logical_not().sum()
        return self.prefixes[key]

    def rows_that_drop(self, rows: int, tokens: int, offset: int, device: torch.device) -> int | Tensor:
        """How many of (batch * tokens) hidden states may skip inputs; arguments as above. For counting."""
        if isinstance(self.start, Tensor):
            return self._of_prefixes(self.start, tokens, offset, device)[1]
        if self.phase != "masked":
            return rows
        return rows // tokens * max(tokens - max(self.start - offset, 0), 0)

    def expert_rows_that_drop(self, rows: Tensor) -> Tensor:
        """(rows,) bool: which of the hidden states with these numbers, of batch * tokens, may skip inputs."""
        start = self.start if self.phase == "masked" else 0
        if isinstance(start, Tensor):
            start = start.to(rows.device)[rows // self.tokens]
        return rows % self.tokens >= start


def decide(rule: Rule, context: PassContext, rows: int) -> Decision:
    """What a layer does with its inputs.

    Args:
        rule: the layer's.
        context: of the pass.
        rows: hidden states that the layer is given.
    """
    if not context.may_drop(rows) or isinstance(rule, Dense):
        return "dense"
    return "masked" if context.phase == "masked" else "skip"


_INPUTS = ("input_ids", "inputs_embeds", "hidden_states")


def shape_of_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int] | None:
    """Batch and tokens of what a model, or a stack of its blocks, is called with; None where nothing tells."""
    given = next((value for name in _INPUTS if (value := kwargs.get(name)) is not None), None)
    if given is None and args:
        given = args[0]
    if not isinstance(given, Tensor) or given.dim() < 2:
        return None
    return given.shape[0], given.shape[1]
