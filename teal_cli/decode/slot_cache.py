"""One KV cache of several sequences that come and go, each in a place of its own.

Kernels read the first places of it, so those that decode lie in front. Another sequence changes places with one.
"""

from collections.abc import Sequence

from teal_cli.decode.cache import FixedCache, FixedLayer


class SlotCache:
    """Keys and values of `places` sequences, in memory that is taken once.

    Args:
        one: a cache with at least one position of one row, whose kinds of layers, shapes and dtypes it takes.
        places: how many.
        positions: of each.
    """

    def __init__(self, one: FixedCache, places: int, positions: int) -> None:
        self.places, self.positions = places, positions
        self.layers: list[FixedLayer] = [layer.like(places, positions) for layer in one.layers]
        self.lengths = [0] * places
        """Positions that are written, of each place."""

    def some(self, places: range) -> "PlaceCache":
        """Neighbouring places as a cache: one for a piece of a prompt, or those that a session steps."""
        return PlaceCache(self, places)

    def copy(self, source: int, target: int, length: int) -> None:
        """Give one sequence the first positions of another's."""
        for layer in self.layers:
            for read, written in zip(layer.memory_of(source, length), layer.memory_of(target, length), strict=True):
                written.copy_(read)

    def exchange(self, source: int, target: int) -> None:
        """Have two sequences change places."""
        lengths = self.lengths
        longest = max(lengths[source], lengths[target])
        for layer in self.layers:
            ours, others = layer.memory_of(source, longest), layer.memory_of(target, longest)
            for own, other in zip(ours, others, strict=True):
                if lengths[source] == 0:  # there is nothing to be kept
                    own.copy_(other)
                elif lengths[target] == 0:
                    other.copy_(own)
                else:
                    held = own.clone()
                    own.copy_(other)
                    other.copy_(held)
        lengths[source], lengths[target] = lengths[target], lengths[source]


class PlaceCache(FixedCache):
    """Some places of a `SlotCache`, one beside the other, as a cache whose rows they are."""

    def __init__(self, memory: SlotCache, places: range) -> None:
        super().__init__(0, memory.positions)
        self._memory, self._places = memory, places
        length = max(memory.lengths[place] for place in places)
        self.layers = [layer.rows(places.start, places.stop, length) for layer in memory.layers]

    @property
    def length(self) -> int:
        """As `FixedCache.length`."""
        return max(self.row_lengths())

    def row_lengths(self) -> list[int]:
        """As `FixedCache.row_lengths`."""
        return self._memory.lengths[self._places.start : self._places.stop]

    def take_lengths(self, lengths: Sequence[int]) -> None:
        """Say how long the rows are by now."""
        self._memory.lengths[self._places.start : self._places.stop] = lengths

    def shorten(self, lengths: list[int]) -> None:
        """As `FixedCache.shorten`."""
        self.take_lengths(lengths)

    def advance(self, count: int = 1) -> None:
        """As `FixedCache.advance`. What layers count is of no use here."""
        self.take_lengths([length + count for length in self.row_lengths()])

    def check_extendable(self) -> None:
        """As `FixedCache.check_extendable`: a prompt is of one place."""
        if len(self._places) > 1:
            raise ValueError("prompts are run one at a time here")
