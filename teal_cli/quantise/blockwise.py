"""GPTQ through a model: block after block, each on what the quantised blocks before it give."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from teal_cli.errors import ArtefactError
from teal_cli.models.architectures import Projection
from teal_cli.models.block_calls import BlockCall, hooked, recorded
from teal_cli.quantise.dequantise import dequantise_
from teal_cli.quantise.rounding import gptq
from teal_cli.schemes import Scheme
from teal_kernels.packing import Packed


@torch.no_grad()
def quantise_blocks_(
    model: nn.Module,
    path: str,
    projections: list[Projection],
    scheme: Scheme,
    batches: tuple[Tensor, ...],
    on_block: Callable[[int], None] = lambda blocks: None,
) -> dict[str, Packed]:
    """Quantise the projections of every block in the order in which a token meets them.

    Args:
        model: a dense causal language model; takes on the quantised weights.
        path: of its blocks.
        projections: of the blocks.
        scheme: bits and groups.
        batches: (sequences, tokens) int64 each: the text whose hidden states count.
        on_block: told of each block done.

    Returns:
        Module path -> codes, scales and zero points.

    Raises:
        ArtefactError: hidden states that are not finite.
    """
    blocks = list(model.get_submodule(path).children())
    calls, hidden = _calls(model, blocks, batches)
    sites: dict[str, list[str]] = {}
    for projection in projections:
        sites.setdefault(projection.site, []).append(projection.name)
    packs: dict[str, Packed] = {}
    for number, block in enumerate(blocks):
        for site, names in sites.items():
            if not site.startswith(f"{path}.{number}."):
                continue
            layers = [model.get_submodule(name) for name in names]
            with _summed(layers[0]) as products:
                for call, states in zip(calls[number], hidden, strict=True):
                    call.on(block, states)
            if not bool(products().isfinite().all()):
                raise ArtefactError(
                    f"{site} has hidden states that are not finite: run with --dtype float32 or bfloat16"
                )
            weights: list[Tensor] = [layer.weight for layer in layers]  # type: ignore[misc]
            of_site = dict(zip(names, gptq(weights, products(), scheme), strict=True))
            dequantise_(model, of_site)
            packs |= of_site
        hidden = [call.on(block, states) for call, states in zip(calls[number], hidden, strict=True)]
        on_block(1)
    return packs


def _calls(
    model: nn.Module, blocks: list[nn.Module], batches: tuple[Tensor, ...]
) -> tuple[list[list[BlockCall]], list[Tensor]]:
    """Block -> its call for every batch, without hidden states; and those that the first block reads."""
    calls: list[list[BlockCall]] = [[] for _ in blocks]
    hidden = []
    device = next(model.parameters()).device
    for batch in batches:
        with recorded(blocks) as made:
            model.base_model(input_ids=batch.to(device), use_cache=False)  # type: ignore[operator]
        hidden.append(made[0].hidden)
        for of_block, call in zip(calls, made, strict=True):
            of_block.append(call.without_hidden())
    return calls, hidden


@contextmanager
def _summed(layer: nn.Module) -> Iterator[Callable[[], Tensor]]:
    """The sum of x x^T over all inputs x that a layer is called with meanwhile: (in, in) float32."""
    width = int(layer.in_features)  # type: ignore[arg-type]
    sums: list[Tensor] = []

    def called(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].flatten(0, -2).float()
        if not sums:
            sums.append(torch.zeros(width, width, device=x.device))
        sums[0].addmm_(x.t(), x)

    with hooked([layer.register_forward_pre_hook(called)]):
        yield lambda: sums[0]
