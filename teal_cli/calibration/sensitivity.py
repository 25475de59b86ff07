"""What dropping the inputs of a projection costs, to first order: one forward and one backward pass.

Let x be the input of a projection at a token and u the gradient of the loss with respect to it, as
far as it goes through this projection (W^T g). Dropping the inputs D changes the loss by
-sum over D of u_i x_i, to first order. Its square, summed over tokens, is the projection's cost of
the threshold that drops D. All thresholds are had at once: u x is added up by bins of |x|, and the
sums run on from bin to bin. The squares of a text add up over tokens, so costs of two texts add up
too. This is an empirical Fisher information of masks (derived in docs/method.md).

Gradients of activations only. One block at a time is run again with gradients, so memory holds the
hidden states between blocks and what one block keeps.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teal_cli.calibration import histogram
from teal_cli.calibration.blocks import BlockCall, hidden_of, hooked, recorded
from teal_cli.models.architectures import OUTPUT_SITE, Projection
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


def squared_changes(x: Tensor, gradient: Tensor) -> Tensor:
    """Squared first-order loss changes by threshold, summed over tokens.

    Args:
        x: (tokens, in), the input of a projection.
        gradient: (tokens, in), of the loss with respect to it.

    Returns:
        (BINS,) float64: entry b for dropping every |x| in bins up to b.
    """
    parts = x.float() * gradient.float()
    sums = torch.zeros(len(x), BINS, device=x.device).scatter_add_(1, _bin_of(x), parts)
    return sums.cumsum_(1).double().square_().sum(0)


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


def _forward(
    model: Any, blocks: nn.ModuleList, ids: Tensor, behind: dict[str, nn.Module]
) -> tuple[list[BlockCall], Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """What every block was called with, the loss's gradient at the last block's output, and projections behind it.

    Of those, each one's input with its gradient, as `_backward` gives them.
    """
    last: list[Tensor] = []
    inputs: dict[str, Tensor] = {}

    def cut(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        # No parameter takes a gradient, so the graph begins here, behind all blocks.
        last.append(hidden_of(output).detach().requires_grad_())
        return (last[0], *output[1:]) if isinstance(output, tuple) else last[0]

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            inputs[name] = args[0]

        return hook

    handles = [module.register_forward_pre_hook(hook_for(name)) for name, module in behind.items()]
    with recorded(blocks) as calls, hooked([blocks[-1].register_forward_hook(cut), *handles]):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    gradient, *gradients = torch.autograd.grad(loss, [*last, *inputs.values()])
    return calls, gradient, _states(inputs, gradients)


def _backward(
    block: nn.Module, call: BlockCall, gradient: Tensor, projections: dict[str, nn.Module]
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Through one block: the gradient at its input, and each projection's input with its gradient."""
    inputs: dict[str, Tensor] = {}

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        def hook(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
            # A name of its own: of a state that several projections read, only this one's share.
            inputs[name] = given[0].view_as(given[0])
            return (inputs[name], *given[1:])

        return hook

    start = call.hidden.detach().requires_grad_()
    with hooked(module.register_forward_pre_hook(hook_for(name)) for name, module in projections.items()):
        output = call.on(block, start)
    before, *gradients = torch.autograd.grad(output, [start, *inputs.values()], gradient)
    return before, _states(inputs, gradients)


def _states(inputs: dict[str, Tensor], gradients: list[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: (x.detach(), found) for (name, x), found in zip(inputs.items(), gradients, strict=True)}


@torch.enable_grad()
def measure(
    model: Any,
    blocks: str,
    projections: list[Projection],
    batches: Iterable[Tensor],
    *,
    sink_tokens: int,
    on_batch: Callable[[int], None] = lambda tokens: None,
) -> dict[str, Tensor]:
    """The costs of every projection's thresholds.

    Args:
        model: a transformers causal language model in eval mode.
        blocks: path of its decoder blocks.
        projections: from `find_projections`.
        batches: (batch, tokens) int64 each, unpadded.
        sink_tokens: leading positions of each sequence not counted.
        on_batch: called with the number of tokens after each batch.

    Returns:
        projection name -> (BINS,) float64 on the CPU, sums over tokens; see `squared_changes`.
    """
    stack: Any = model.get_submodule(blocks)
    readers = [
        {p.name: model.get_submodule(p.name) for p in projections if p.name.startswith(f"{blocks}.{index}.")}
        for index in range(len(stack))
    ]
    behind = {p.name: model.get_submodule(p.name) for p in projections if p.site == OUTPUT_SITE}
    device = computing_device(model)
    # Added up on the device: a copy to the host for each projection would wait for it.
    found = {p.name: torch.zeros(BINS, dtype=torch.float64, device=device) for p in projections}

    def add(states: dict[str, tuple[Tensor, Tensor]]) -> None:
        for name, (x, at_x) in states.items():
            counted = squared_changes(x[:, sink_tokens:].flatten(0, 1), at_x[:, sink_tokens:].flatten(0, 1))
            found[name] += counted.to(device)

    with _frozen(model):
        for batch in batches:
            calls, gradient, states = _forward(model, stack, batch.to(device), behind)
            add(states)
            for block, modules in zip(reversed(stack), reversed(readers), strict=True):
                gradient, states = _backward(block, calls.pop(), gradient, modules)
                add(states)
            on_batch(batch.numel())
    return {name: squares.cpu() for name, squares in found.items()}
