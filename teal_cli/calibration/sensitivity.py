"""What dropping the inputs of a projection costs, to first order: one forward and one backward pass.

Let x be the input of a projection at a token and u the gradient of the loss with respect to it, as
far as it goes through this projection (W^T g). Dropping the inputs D changes the loss by
-sum over D of u_i x_i, to first order. Its square, summed over tokens, is the projection's cost of
the threshold that drops D. All thresholds are had at once: u x is added up by bins of |x|, and the
sums run on from bin to bin. The squares of a text add up over tokens, so costs of two texts add up
too. This is an empirical Fisher information of masks (derived in docs/method.md).

Gradients of activations only. Of a decoder one block at a time is run again with gradients, so
memory holds the hidden states between blocks and what one block keeps; encoders and encoder-decoders
go through in one piece.

An encoder has no loss. What it is used for is the direction of the mean of its last hidden states; a
random projection of that (signs, new ones for every sequence) stands for the loss: its squared change
is, on average, that of the direction. And an encoder drops inputs at all positions at once, so the
changes of a sequence are added up before they are squared: taken by themselves they would seem to
cancel out.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teal_cli.calibration import histogram
from teal_cli.models.architectures import Architecture, Projection, architecture_for
from teal_cli.models.block_calls import BlockCall, hidden_of, hooked, recorded
from teal_cli.models.forward import halves, run_text
from teal_cli.models.layers import rows_from
from teal_cli.models.offload import computing_device

_FINE_BITS = 5
"""2**5 bins of the histogram are one bin here: eight to a doubling of |x|."""
BINS = ((histogram.BINS - 2) >> _FINE_BITS) + 2


def _bin_of(x: Tensor) -> Tensor:
    """The bin of every element of (tokens, in): int64."""
    fine = histogram.bin_of(x).view(x.shape)
    return ((fine - 1) >> _FINE_BITS).add_(1).clamp_(0, BINS - 1).long()


def edges() -> list[int]:
    """The bin of a histogram at which each bin here ends."""
    return [min(index << _FINE_BITS, histogram.BINS - 1) for index in range(BINS - 1)] + [histogram.BINS - 1]


def squared_changes(x: Tensor, gradient: Tensor, *, together: bool = False) -> Tensor:
    """Squared first-order loss changes by threshold, summed over tokens.

    Args:
        x: (tokens, in), the input of a projection.
        gradient: (tokens, in), of the loss with respect to it.
        together: all tokens drop at once: the square is that of their sum.

    Returns:
        (BINS,) float64: entry b for dropping every |x| in bins up to b.
    """
    parts = x.float() * gradient.float()
    sums = torch.zeros(len(x), BINS, device=x.device).scatter_add_(1, _bin_of(x), parts)
    sums = sums.cumsum_(1).double()
    return sums.sum(0).square_() if together else sums.square_().sum(0)


class _State(NamedTuple):
    """What a projection was called with, and the loss's gradient with respect to it."""

    x: Tensor
    gradient: Tensor
    rest: tuple[Any, ...]
    """Its further arguments."""


class _Inputs:
    """Hooks that give every projection an input of its own name: of a state that several read, each has its share."""

    def __init__(self, projections: dict[str, nn.Module]) -> None:
        self.x: dict[str, Tensor] = {}
        self._rest: dict[str, tuple[Any, ...]] = {}
        self.handles = [module.register_forward_pre_hook(self._hook_for(name)) for name, module in projections.items()]

    def _hook_for(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        def hook(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
            x, self._rest[name] = given[0], given[1:]
            # Before the first block nothing asks for a gradient yet.
            self.x[name] = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            return (self.x[name], *given[1:])

        return hook

    def states(self, gradients: list[Tensor]) -> dict[str, _State]:
        """Projection -> its state."""
        pairs = zip(self.x.items(), gradients, strict=True)
        return {name: _State(x.detach(), found, self._rest[name]) for (name, x), found in pairs}


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Parameters that take no gradient, for a while."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed over (batch, tokens)."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")


def _forward(
    model: Any, blocks: nn.ModuleList, ids: Tensor, behind: dict[str, nn.Module]
) -> tuple[list[BlockCall], Tensor, dict[str, _State]]:
    """What every block was called with, the loss's gradient at the last block's output, and projections behind it.

    Of those, each one's input with its gradient, as `_backward` gives them.
    """
    last: list[Tensor] = []

    def cut(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        # No parameter takes a gradient, so the graph begins here, behind all blocks.
        last.append(hidden_of(output).detach().requires_grad_())
        return (last[0], *output[1:]) if isinstance(output, tuple | list) else last[0]

    inputs = _Inputs(behind)
    with recorded(blocks) as calls, hooked([blocks[-1].register_forward_hook(cut), *inputs.handles]):
        logits = run_text(model, ids, logits_to_keep=0).logits[:, :-1]
    gradient, *gradients = torch.autograd.grad(_cross_entropy(logits, ids[:, 1:]), [*last, *inputs.x.values()])
    return calls, gradient, inputs.states(gradients)


def _backward(
    block: nn.Module, call: BlockCall, gradient: Tensor, projections: dict[str, nn.Module]
) -> tuple[Tensor, dict[str, _State]]:
    """Through one block: the gradient at its input, and each projection's input with its gradient."""
    start = call.hidden.detach().requires_grad_()
    inputs = _Inputs(projections)
    with hooked(inputs.handles):
        output = call.on(block, start)
    before, *gradients = torch.autograd.grad(output, [start, *inputs.x.values()], gradient)
    return before, inputs.states(gradients)


def _by_block(model: Any, path: str, projections: list[Projection], ids: Tensor) -> Iterator[dict[str, _State]]:
    """The states of a decoder's projections, from the last block to the first."""
    stack: Any = model.get_submodule(path)
    behind = {p.name: model.get_submodule(p.name) for p in projections if p.is_output}
    calls, gradient, states = _forward(model, stack, ids, behind)
    yield states
    for index in reversed(range(len(stack))):
        prefix = f"{path}.{index}."
        readers = {p.name: model.get_submodule(p.name) for p in projections if p.name.startswith(prefix)}
        gradient, states = _backward(stack[index], calls.pop(), gradient, readers)
        yield states


def _in_one_piece(
    model: Any, architecture: Architecture, projections: list[Projection], ids: Tensor, generator: torch.Generator
) -> Iterator[dict[str, _State]]:
    """The states of all projections of an encoder, an encoder-decoder, or a decoder with several rows of blocks."""
    inputs = _Inputs({p.name: model.get_submodule(p.name) for p in projections})
    with hooked(inputs.handles):
        output = run_text(model, ids, logits_to_keep=0)
    if architecture.kind == "causal":
        loss = _cross_entropy(output.logits[:, :-1], ids[:, 1:])
    elif architecture.kind == "seq2seq":
        loss = _cross_entropy(output.logits, halves(model, ids).target)
    else:
        direction = F.normalize(output.last_hidden_state.float().mean(1), dim=-1)
        signs = torch.randint(0, 2, direction.shape, generator=generator).to(direction) * 2 - 1
        loss = (direction * signs).sum()
    yield inputs.states(list(torch.autograd.grad(loss, list(inputs.x.values()))))


@torch.enable_grad()
def measure(
    model: Any,
    projections: list[Projection],
    batches: Iterable[Tensor],
    *,
    sink_tokens: int,
    on_batch: Callable[[int], None] = lambda tokens: None,
) -> dict[str, Tensor]:
    """The costs of every projection's thresholds.

    Args:
        model: a transformers model in eval mode.
        projections: from `find_projections`.
        batches: (batch, tokens) int64 each, unpadded.
        sink_tokens: leading positions of each sequence not counted.
        on_batch: called with the number of tokens after each batch.

    Returns:
        projection name -> (BINS,) float64 on the CPU, sums over tokens; see `squared_changes`.
    """
    architecture = architecture_for(model)
    device = computing_device(model)
    # Added up on the device: a copy to the host for each projection would wait for it.
    found = {p.name: torch.zeros(BINS, dtype=torch.float64, device=device) for p in projections}
    generator = torch.Generator().manual_seed(0)

    def squares(state: _State, shape: torch.Size) -> Tensor:
        if architecture.kind == "encoder":
            pairs = zip(state.x, state.gradient, strict=True)  # sequence by sequence
            changes = [squared_changes(x, at_x, together=True) for x, at_x in pairs]
            return torch.stack(changes).sum(0)
        x, at_x = (rows_from(sink_tokens, part, state.rest, shape) for part in (state.x, state.gradient))
        return squared_changes(x, at_x)

    with _frozen(model):
        for batch in batches:
            ids = batch.to(device)
            if architecture.is_one_decoder:
                passes = _by_block(model, architecture.blocks[0], projections, ids)
            else:
                passes = _in_one_piece(model, architecture, projections, ids, generator)
            for states in passes:
                for name, state in states.items():
                    found[name] += squares(state, batch.shape).to(device)
            on_batch(batch.numel())
    return {name: squares.cpu() for name, squares in found.items()}
