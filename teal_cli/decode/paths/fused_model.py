"""What a session of the fused path needs of the path, which imports the session."""

from typing import Any, Protocol

import torch

from teal_cli.decode.blocks import BlockStep, Norm, Product
from teal_cli.decode.paths.fused_angles import Angles
from teal_cli.decode.paths.fused_ranks import Sums
from teal_cli.decode.scales import Scales
from teal_cli.sparse import SparsityControl


class FusedModel(Protocol):
    """The fused path."""

    model: Any
    control: SparsityControl
    device: torch.device
    dtype: torch.dtype
    pdl: bool
    blocks: list[list[BlockStep]]
    last_norm: Norm
    scales: Scales
    compiles: bool
    """As `ProgramPath.compiles`."""
    compiled: set[tuple[object, ...]]
    """The kinds of sessions whose kernels are compiled (`FusedSession.compile`)."""

    def angles(self, positions: int) -> Angles:
        """For a cache of so many positions; of all sessions that hold them the same."""
        ...

    def output(self) -> Product | None:
        """Of an output layer that is launched as the products of a block are."""
        ...

    def sums(self, rows: int) -> Sums | None:
        """Over ranks, for a session of so many rows; None where one process holds the model."""
        ...

    def is_summed(self, product: Product) -> bool:
        """Whether each rank has some of the inputs of a product, whose results are then summed."""
        ...

    @property
    def vocabulary(self) -> int:
        """Logits of the model, of all ranks."""
        ...
