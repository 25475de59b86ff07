"""The KV cache that the native library reads: keys of neighbouring positions side by side."""

from torch import Tensor

from teal_cli.decode.cache import FixedCache, FixedLayer
from teal_kernels.native.structures import KEY_BLOCK


class NativeLayer(FixedLayer):
    """One layer of it; each row has room for whole blocks of `KEY_BLOCK` positions.

    `keys` are (batch, heads, blocks, head size, KEY_BLOCK), so that scores of the positions of a block are one
    vector; `values` are (batch, heads, blocks * KEY_BLOCK, head size).
    """

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the memory, in the shape and dtype of the first states."""
        batch, heads, _, size = key_states.shape
        blocks = -(-self.positions // KEY_BLOCK)
        self.dtype, self.device = key_states.dtype, key_states.device
        # Zeros: a masked read of a position not yet written must not find NaN.
        self.keys = key_states.new_zeros(batch, heads, blocks, size, KEY_BLOCK)
        self.values = value_states.new_zeros(batch, heads, blocks * KEY_BLOCK, value_states.shape[-1])
        self.is_initialized = True

    def states_of(self, row: int, length: int) -> tuple[Tensor, Tensor]:
        """As `FixedLayer.states_of`; of keys a copy."""
        keys = self.keys[row, :, : -(-length // KEY_BLOCK)].transpose(-1, -2).flatten(1, 2)
        return keys[:, :length], self.values[row, :, :length]

    def memory_of(self, row: int, length: int) -> tuple[Tensor, Tensor]:
        """As `FixedLayer.memory_of`: whole blocks of keys."""
        return self.keys[row, :, : -(-length // KEY_BLOCK)], self.values[row, :, :length]

    def _write(self, start: int, key_states: Tensor, value_states: Tensor) -> None:
        self.values[:, :, start : self.length] = value_states
        by_position = self.keys.transpose(-1, -2)  # (batch, heads, blocks, KEY_BLOCK, head size)
        at = start
        while at < self.length:
            block, lane = divmod(at, KEY_BLOCK)
            whole = 0 if lane else (self.length - at) // KEY_BLOCK
            count = whole * KEY_BLOCK or min(KEY_BLOCK - lane, self.length - at)
            states = key_states[:, :, at - start : at - start + count]
            if whole:
                by_position[:, :, block : block + whole] = states.unflatten(2, (whole, KEY_BLOCK))
            else:
                by_position[:, :, block, lane : lane + count] = states
            at += count

    def _written(self, start: int, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Of the first states themselves, so that a prompt is read as it was made."""
        if start == 0:
            return key_states, value_states
        blocks = -(-self.length // KEY_BLOCK)
        keys = self.keys[:, :, :blocks].transpose(-1, -2).flatten(2, 3)
        return keys[:, :, : self.length], self.values[:, :, : self.length]


class NativeCache(FixedCache):
    """A `FixedCache` of such layers."""

    def __init__(self, layers: int, positions: int, copies: int = 1) -> None:
        super().__init__(layers, positions, NativeLayer, copies)
