"""Experts that each token has chosen, as a product reads them: ids and weights on the device.

The tables of all experts have one size and lie one behind the other. A launch takes every expert of every token by
itself, as a product of one row: of many experts two tokens seldom choose the same. Of the first product (gate and up)
the outputs of a token's experts stand side by side. Of the last one (down) the inputs do: what the experts of a token
make is one sum over all of them, each weighted as the router says, in the order in which they were chosen.

Nothing here needs triton.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from teal_kernels.launching import LEAST_TILE
from teal_kernels.packing import Packed
from teal_kernels.plan_gemv import MAX_ROWS, TileConfig


class ExpertConstants(NamedTuple):
    """Which table a program of a product reads."""

    chosen: int
    """Experts of a token; 0 where there are none."""
    blocks: int
    """Of the outputs of one table."""
    chunks: int
    """Of the inputs of one table."""
    tokens: int
    """That have chosen."""


NO_EXPERTS = ExpertConstants(0, 0, 0, 0)


@dataclass(frozen=True)
class Chosen:
    """The experts of a batch of tokens, and where their tables lie.

    Of a `residual` product x is (tokens * chosen, in) and y is (tokens, out). Of others x is (tokens, in) and y is
    (tokens * chosen, out).
    """

    ids: Tensor
    """(tokens, chosen) int32."""
    weights: Tensor
    """(tokens, chosen) float32: of what each adds, read by `residual` products."""
    stride: int
    """Elements, or words of quantised weights, from one expert's table to the next."""
    scales: int = 0
    """Scales of quantised weights from one expert's to the next; zero points alike."""

    def side_by_side(self, epilogue: str) -> int:
        """Products that one launch computes."""
        return self.ids.shape[0] if epilogue == "residual" else self.ids.numel()

    def summed(self, epilogue: str) -> int:
        """Tables whose products are summed to one."""
        return self.ids.shape[1] if epilogue == "residual" else 1

    def constants(self, epilogue: str, grid: tuple[int, int]) -> ExpertConstants:
        """What the kernel must know, of a launch with this grid."""
        return ExpertConstants(
            chosen=self.ids.shape[1],
            blocks=grid[0] // self.side_by_side(epilogue),
            chunks=grid[1] // self.summed(epilogue),
            tokens=self.ids.shape[0],
        )

    def check(self, x: Tensor, y: Tensor, epilogue: str) -> None:
        """Refuse what has not as many rows as there are tokens, or as these have experts.

        Raises:
            ValueError: it does not fit.
        """
        tokens, pairs = self.ids.shape[0], self.ids.numel()
        wanted = (pairs, tokens) if epilogue == "residual" else (tokens, pairs)
        if (x.shape[0], y.shape[0]) != wanted or tokens > MAX_ROWS:
            raise ValueError(
                f"{tokens} tokens, at most {MAX_ROWS}, with {self.ids.shape[1]} experts each do not fit "
                f"{x.shape[0]} rows that become {y.shape[0]}"
            )


def stacked(tables: Sequence[Packed]) -> Packed:
    """Quantised tables of all experts as one stack: `Packed` whose tensors have the experts in front."""
    first = tables[0]
    return replace(
        first,
        words=torch.stack([table.words for table in tables]),
        scales=torch.stack([table.scales for table in tables]),
        zeros=None if first.zeros is None else torch.stack([t.zeros for t in tables if t.zeros is not None]),
    )


def expert_of(stack: Packed, nth: int) -> Packed:
    """One expert's table of a stack."""
    zeros = None if stack.zeros is None else stack.zeros[nth]
    return replace(stack, words=stack.words[nth], scales=stack.scales[nth], zeros=zeros)


def table_of(stack: Tensor | Packed) -> Tensor | Packed:
    """The first expert's table of a stack: of (experts, in, out), or of what `stacked` makes."""
    return stack[0] if isinstance(stack, Tensor) else expert_of(stack, 0)


def chosen_of(stack: Tensor | Packed, ids: Tensor, weights: Tensor) -> Chosen:
    """Experts of a stack.

    Raises:
        ValueError: the tables do not lie as the kernel reads them.
    """
    if isinstance(stack, Tensor):
        if stack.stride(2) != 1:
            raise ValueError("experts must lie input-major: (experts, in, out), each row contiguous")
        return Chosen(ids, weights, stack.stride(0))
    if not (stack.scales.is_contiguous() and (stack.zeros is None or stack.zeros.is_contiguous())):
        raise ValueError("scales and zero points of experts must be contiguous")
    return Chosen(ids, weights, stack.words.stride(0), stack.scales.stride(0))


def fitting_experts(config: TileConfig, inputs: int, parts: tuple[int, ...]) -> TileConfig:
    """A tile config of one long product, as the tables of experts allow it.

    Chunks end where a table does: chunks of one table are made alike, so that no program has much less to do than
    others. Blocks that would reach over the end of a part are made smaller, for the same reason.
    """
    chunks = -(-inputs // config.inputs_per_chunk)
    even = -(-inputs // chunks)
    block = config.block_out
    while block > 2 * LEAST_TILE and any(part % block for part in parts):
        block //= 2
    if any(part % block for part in parts):
        block = config.block_out
    return replace(
        config,
        block_out=block,
        block_in=config.block_in * config.block_out // block,
        inputs_per_chunk=min(config.inputs_per_chunk, -(-even // 32) * 32),
    )


def no_ids(tokens: int, chosen: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and weights that a router has not written yet: the first expert's, which exists."""
    ids = torch.zeros(tokens, chosen, dtype=torch.int32, device=device)
    return ids, torch.zeros(tokens, chosen, dtype=torch.float32, device=device)
