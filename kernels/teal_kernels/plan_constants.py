"""The constants of the product kernel, in three groups: Triton takes each as one argument.

`plan_gemv` finds them; what a field is that has no words here, `ProductShape` says.
"""

from typing import NamedTuple


class TileConstants(NamedTuple):
    """Tiles of weights, as this batch runs them."""

    block_out: int
    block_in: int
    unroll: int
    warps: int
    evict: str
    """Triton's eviction policy for weights."""
    bits: int
    """Of a weight."""
    fma: bool
    """Whether rows are multiplied by FMA instructions, not on tensor cores."""
    pack: int
    """Weights in a word of the table."""
    words: int
    """Words of a row that a program reads."""


class InputConstants(NamedTuple):
    """How a program takes its inputs."""

    listed: bool
    """Whether those above the threshold are listed; else every row of weights is read."""
    own_thresholds: bool
    """Whether each row has thresholds of its own."""
    norm: bool
    """Whether inputs are normalised as they are taken."""
    norm_in_tiles: bool
    """Whether they are normalised as tensor cores take tiles of them."""
    norm_plus_one: bool
    norm_centred: bool
    added: bool
    added_plus_one: bool  # these as in `ProductShape`
    norm_squares: int
    """Partial sums of squares of a row, up to a power of two."""
    taken: bool
    """Whether inputs are written to the list: all of them in their own slots, or with `listed` those that are kept."""
    several_groups: bool
    """Whether a chunk has several groups of quantised weights."""
    lanes: int
    """Inputs of a vector."""
    vectors: int
    """Vectors taken at a time."""
    at_once: bool
    """Whether those are all of the chunk."""
    full: bool
    """Whether no vector reaches beyond the inputs."""
    capacity: int
    """Entries of a list in global memory, for each row."""
    slots: int
    """Entries of a list, for each row."""
    shared_bytes: int
    """Of a list in shared memory; 0 where it lies in global memory."""
    head_size: int
    """As in `ProductShape`."""
    splits: int
    split_multiple: int
    vectors_per_head: int
    """Vectors, one after the other, that surely lie in one head."""


class EpilogueConstants(NamedTuple):
    """How partial sums become results."""

    kind: int
    """One of `EPILOGUES`."""
    two: bool
    """Whether a result is made of two sums, gate and up."""
    activation: int
    scaled: bool
    sums: bool  # these as in `ProductShape`
    plus_one: bool
    """Of the norm behind `beside`."""
    even: bool
    """Whether every part is a multiple of `block_out`."""
    split: bool
    """Whether inputs are split into several chunks."""
    reducers: int
    """Programs that share the epilogue of one block."""
    gathered: int
    """Chunks whose partial sums are read at a time."""
    batch: int
    """Rows, up to a power of two."""
