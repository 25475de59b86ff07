"""A KV cache in memory that is taken once, which both transformers and our own kernels fill."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from teal_cli.errors import UsageError


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

    def __init__(self, positions: int, copies: int = 1) -> None:
        super().__init__()
        self.positions = positions
        self.copies = copies
        """Of each head, that states come with (Falcon's); one is kept."""
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
        if self.copies > 1:
            key_states, value_states = key_states[:, :: self.copies], value_states[:, :: self.copies]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[-2]
        self._write(start, key_states, value_states)
        keys, values = self._written(start, key_states, value_states)
        if self.copies == 1:
            return keys, values
        return keys.repeat_interleave(self.copies, dim=1), values.repeat_interleave(self.copies, dim=1)

    def _write(self, start: int, key_states: Tensor, value_states: Tensor) -> None:
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states

    def _written(self, start: int, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """What attention reads: (batch, heads, length, head size) each."""
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def like(self, rows: int, positions: int) -> "FixedLayer":
        """An empty layer of the same kind, for so many rows and positions. There must be states of one row."""
        made = type(self)(positions, self.copies)
        states = self.states_of(0, 1)
        made.lazy_initialization(*(state[None].expand(rows, *state.shape) for state in states))
        return made

    def states_of(self, row: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a row's first positions: (heads, length, head size) each, whatever the layout."""
        return self.keys[row, :, :length], self.values[row, :, :length]

    def rows(self, first: int, last: int, length: int) -> "FixedLayer":
        """Some rows of this memory as a layer of their own, of which so many positions are written."""
        made = type(self)(self.positions, self.copies)
        made.keys, made.values = self.keys[first:last], self.values[first:last]
        made.dtype, made.device, made.length, made.is_initialized = self.dtype, self.device, length, True
        return made

    def memory_of(self, row: int, length: int) -> tuple[Tensor, Tensor]:
        """The memory in which a row's first positions lie, and maybe a few more, as views."""
        return self.states_of(row, length)

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
    """A cache of `FixedLayer`s, in which each row (sequence) may have a length of its own.

    A row's tokens lie at its own positions from 0 on. What lies behind them is of padding, or zero: no kernel reads
    it, and the row's next tokens overwrite it.
    """

    layers: list[FixedLayer]  # type: ignore[assignment]  # transformers' list is of any kind of layer

    def __init__(self, layers: int, positions: int, kind: type[FixedLayer] = FixedLayer, copies: int = 1) -> None:
        super().__init__(layers=[kind(positions, copies) for _ in range(layers)])
        self.positions = positions
        self._shorter: list[int] | None = None  # of each row, positions fewer than `length`

    @property
    def length(self) -> int:
        """Positions written, of the longest row."""
        return self.layers[0].length

    def row_lengths(self) -> list[int]:
        """Positions of each row that hold its tokens."""
        if self._shorter is not None:
            return [self.length - fewer for fewer in self._shorter]
        return [self.length] * int(self.layers[0].keys.shape[0])

    def shorten(self, lengths: list[int]) -> None:
        """Say how long the rows are, after a prefill of prompts that were padded on the right.

        Args:
            lengths: of each row, from 1 to `length`.
        """
        longest = max(lengths)
        for layer in self.layers:
            layer.length = longest
        self._shorter = [longest - length for length in lengths]

    def truncate(self, length: int) -> None:
        """Forget what lies behind the first positions of all rows, which must have as many."""
        for layer in self.layers:
            layer.length = length
        self._shorter = None

    def grown(self, positions: int) -> "FixedCache":
        """A cache of more positions with the same tokens, which must be of rows of one length."""
        made = copy.copy(self)
        made.positions, made.layers = positions, []
        for layer in self.layers:
            larger = layer.like(layer.keys.shape[0], positions)
            states = zip(*(layer.states_of(row, layer.length) for row in range(layer.keys.shape[0])), strict=True)
            larger.length = layer.length
            larger._write(0, *(torch.stack(rows) for rows in states))
            made.layers.append(larger)
        return made

    def check_extendable(self) -> None:
        """Refuse another prompt behind rows of different lengths.

        Raises:
            UsageError: they are.
        """
        if self._shorter is not None and any(self._shorter):
            raise UsageError("rows of different lengths cannot be given another prompt: use a new cache")

    def advance(self, count: int = 1) -> None:
        """More positions of every row were written by a kernel."""
        after = self.length + count
        for layer in reversed(self.layers):  # the first, which is asked, comes last: an interrupt may fall between them
            layer.length = after

    def reset(self) -> None:
        """Forget everything; the memory stays."""
        super().reset()
        self._shorter = None
