"""Counting hidden states with hooks that are ours, and are removed, on an unmodified model."""

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from teal_cli.calibration import histogram
from teal_cli.errors import ArtefactError
from teal_cli.models.architectures import Projection
from teal_cli.models.forward import watched
from teal_cli.models.layers import Routed, rows_from, unflattened
from teal_cli.models.offload import computing_device
from teal_cli.ranks.group import over_ranks_


class HiddenStateCollector:
    """Histograms of |x| at every site while the context is open.

    One pre-forward hook a site, on the first projection that reads it. Padding and the first
    `sink_tokens` positions of each sequence are left out: attention sinks have hidden states of
    another scale, and always belong to the dense prefill.

    Args:
        model: the dense model.
        projections: from `find_projections`.
        sink_tokens: leading positions of each sequence not counted.
    """

    def __init__(self, model: nn.Module, projections: Iterable[Projection], sink_tokens: int) -> None:
        self.histograms: dict[str, Tensor] = {}
        self._model = model
        self._sink_tokens = sink_tokens
        self._keep: Tensor | None = None
        self._shape: torch.Size | None = None
        self._handles: list[RemovableHandle] = []
        self._readers: dict[str, str] = {}
        for projection in projections:
            self._readers.setdefault(projection.site, projection.name)

    def __enter__(self) -> Self:
        for site, reader in self._readers.items():
            hook = self._hook_for(site)
            self._handles.append(self._model.get_submodule(reader).register_forward_pre_hook(hook))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def attend(self, attention_mask: Tensor | None, shape: torch.Size | None = None) -> None:
        """Say which tokens of the next forward are text: (batch, tokens), 0 for padding; None for all.

        The first `sink_tokens` text tokens of each row are left out, wherever the padding is. `shape` is that
        of the batch, where there is no mask; models that flatten their hidden states need it.
        """
        self._shape = shape if attention_mask is None else attention_mask.shape
        if attention_mask is None or bool(attention_mask.all()):
            self._keep = None
            return
        text = attention_mask.bool()
        self._keep = text & (text.cumsum(1) > self._sink_tokens)

    def _hook_for(self, site: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x: Tensor = args[0]  # (batch, tokens, in), or flattened, or the rows of experts
            if self._keep is None:
                kept = rows_from(self._sink_tokens, x, args[1:], self._shape)
            elif len(args) > 1 and isinstance(args[1], Routed):
                kept = x[self._keep.to(x.device).flatten()[args[1].rows]]
            else:
                kept = unflattened(x, self._shape)[self._keep.to(x.device)]
            counts = histogram.count(kept)
            if site in self.histograms:
                self.histograms[site] += counts
            else:
                self.histograms[site] = counts

        return hook

    def finish(self) -> dict[str, Tensor]:
        """The histograms, on the CPU.

        Raises:
            ArtefactError: nothing was counted, or hidden states were not finite.
        """
        result = {site: over_ranks_(self._model, counts).cpu() for site, counts in self.histograms.items()}
        if not result or not all(int(counts.sum()) for counts in result.values()):
            raise ArtefactError("no hidden state was counted: the sequences are no longer than the sink tokens")
        for site, counts in result.items():
            if histogram.not_finite(counts):
                raise ArtefactError(
                    f"{site}: {histogram.not_finite(counts)} hidden states are infinite, NaN or above 2**24; "
                    "run with --dtype float32 or bfloat16"
                )
        return result


@torch.no_grad()
def collect(
    model: nn.Module,
    projections: list[Projection],
    batches: Iterable[Tensor],
    *,
    sink_tokens: int,
    on_batch: Callable[[int], None] = lambda tokens: None,
) -> dict[str, Tensor]:
    """Run token batches through the dense model and count what every site sees.

    Args:
        model: a transformers model in eval mode.
        projections: from `find_projections`.
        batches: (batch, tokens) int64 each, unpadded.
        sink_tokens: leading positions of each sequence not counted.
        on_batch: called with the number of tokens after each batch.

    Returns:
        site name -> (BINS,) int64 counts, on the CPU.
    """
    device = computing_device(model)
    with_output = any(projection.is_output for projection in projections)
    with (
        HiddenStateCollector(model, projections, sink_tokens) as collector,
        watched(model, with_output=with_output) as run,
    ):
        for batch in batches:
            collector.attend(None, batch.shape)
            run(batch.to(device))
            on_batch(batch.numel())
    return collector.finish()
