"""A KV cache in memory that is taken once, which both transformers and our own kernels fill."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin


class FixedLayer(CacheLayerMixin):
    """One layer's keys and values: (batch, heads, positions, head size), written from the front.

    Unlike transformers' static layer it hands attention the written positions only, so that a prompt
    needs no mask and takes the fast causal kernels; unlike the dynamic one its memory stays put, as
    a captured graph needs. All positions are kept whatever the sliding window, which masks and
    kernels apply.
    """

    is_sliding = False
    is_compileable = False

    keys: Tensor
    values: Tensor

    def __init__(self, positions: int) -> None:
        super().__init__()
        self.positions = positions
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the memory, in the shape and dtype of the first states."""
        batch, heads, _, size = key_states.shape
        shape = (batch, heads, self.positions, size)
        self.dtype, self.device = key_states.dtype, key_states.device
        # Zeros: a masked read of a position not yet written must not find NaN.
        self.keys = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self.values = torch.zeros((*shape[:3], value_states.shape[-1]), dtype=self.dtype, device=self.device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append states; what is written so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[-2]
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a query of this length sees."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Positions written."""
        return self.length

    def get_max_length(self) -> int:
        """Positions there are."""
        return self.positions

    get_max_cache_shape = get_max_length  # its older name

    def reset(self) -> None:
        """Forget everything; the memory stays."""
        super().reset()
        self.length = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beams are not decoded here: reordering would move the memory that kernels know."""
        raise NotImplementedError("a fixed cache cannot be reordered")


class FixedCache(Cache):
    """A cache of `FixedLayer`s."""

    layers: list[FixedLayer]  # type: ignore[assignment]  # transformers' list is of any kind of layer

    def __init__(self, layers: int, positions: int) -> None:
        super().__init__(layers=[FixedLayer(positions) for _ in range(layers)])
        self.positions = positions

    @property
    def length(self) -> int:
        """Positions written."""
        return self.layers[0].length

    def advance(self) -> None:
        """One more position was written by a kernel."""
        for layer in self.layers:
            layer.length += 1
