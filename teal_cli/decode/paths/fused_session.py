"""A session of the fused path: the steps of all blocks bound to buffers, launched one right behind the other."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from teal_cli.checkpoint.rules import ASSUMED_ZEROS, Dense
from teal_cli.decode.blocks import Attention, BlockStep, Product, Route
from teal_cli.decode.blocks import Norm as NormOfStream
from teal_cli.decode.cache import FixedCache, FixedLayer
from teal_cli.decode.paths.program_session import Counted, ProgramSession
from teal_cli.sparse import SparsityControl
from teal_kernels.packed_linear import fitting
from teal_kernels.triton_decode import (
    LOGITS_BLOCK,
    Best,
    attention_splits,
    decode_attention,
    embed,
    find_best,
    output_logits,
    pick,
)
from teal_kernels.triton_gemv import AttentionPartials, Norm, Positions, Scratch, gemv, squares_of
from teal_kernels.tuning import choose_config
from teal_kernels.tuning_entries import kind_of

_HIDDEN = "hidden"
"""The buffer of the residual stream."""


class FusedModel(Protocol):
    """What a session needs of the fused path (which imports this module)."""

    model: Any
    control: SparsityControl
    device: torch.device
    dtype: torch.dtype
    pdl: bool
    blocks: list[list[BlockStep]]
    last_norm: NormOfStream

    def rotary(self, positions: int) -> tuple[Tensor, Tensor]:
        """cos and sin of every position: (positions, head size) each."""
        ...

    def output(self) -> Product | None:
        """Of an output layer that is launched as the products of a block are."""
        ...


class Launch:
    """A product as one session runs it: thresholds, and the tile config that fits the sparsity they give.

    Args:
        product: what is launched.
        enabled: False runs it dense.
        rows: of the batch.
        dtype: of the hidden states.
    """

    def __init__(self, product: Product, enabled: bool, rows: int, dtype: torch.dtype) -> None:
        self.product = product
        table, parts = product.table, product.parts
        rules = [layer.rule if enabled else Dense() for layer in product.sparse_layers]
        values = [rule.threshold for rule in rules]
        self.thresholds = torch.tensor(values, dtype=torch.float32, device=table.device)
        self.kept = torch.zeros(3, dtype=torch.int64, device=table.device)
        """Inputs that were kept, for each part; added to by every launch that skips."""
        expected = [ASSUMED_ZEROS if (share := rule.expected_sparsity) is None else share for rule in rules]
        skipped = sum(share * part for share, part in zip(expected, parts, strict=True))
        config = choose_config(
            table.device,
            inputs=table.shape[0],
            parts=parts,
            dtype=kind_of(table),
            rows=rows,
            epilogue=product.epilogue,
            sparsity=skipped / sum(parts),
        )
        self.config = fitting(config, table, rows)
        self.squares = torch.empty(
            rows, squares_of(table, parts, self.config, rows, dtype), dtype=torch.float32, device=table.device
        )
        """Partial sums of squares of what a `residual` launch wrote, for the norm that follows."""

    def run(
        self, x: Tensor | AttentionPartials, y: Tensor, scratch: Scratch, pdl: bool, norm: Norm | None = None
    ) -> None:
        """Launch it."""
        gemv(
            x,
            self.product.table,
            self.product.parts,
            self.thresholds,
            y,
            self.config,
            scratch,
            bias=self.product.bias,
            norm=norm,
            epilogue=self.product.epilogue,
            squares=self.squares if self.product.epilogue == "residual" else None,
            counts=self.kept,
            pdl=pdl,
        )


class FusedSession(ProgramSession):
    """Decoding of one batch of sequences: the buffers between the launches.

    Tile configs of the products stay, as the plan for which they were chosen.
    """

    def __init__(self, path: FusedModel, cache: FixedCache, rows: int) -> None:
        super().__init__(path.control, cache, rows, path.device)
        self.path = path
        self.captures = path.device.type == "cuda"
        device, dtype = path.device, path.dtype
        self.scratch = Scratch(device)  # of its own: a captured graph holds its addresses
        self.positions = Positions.at([length - 1 for length in self.lengths], device)
        self.cos, self.sin = path.rotary(cache.positions)
        embedding = path.model.get_input_embeddings()
        self._buffers: dict[tuple[str, int], Tensor] = {}
        self.hidden = self._buffer(_HIDDEN, embedding.weight.shape[1])
        self.squares = torch.empty(rows, 1, dtype=torch.float32, device=device)
        self.launches: list[Launch] = []
        self._steps: list[Callable[[], None]] = []
        last = self._bind_blocks()
        self._norm = Norm(path.last_norm.weight, path.last_norm.eps, last)
        output = path.output()
        self.output = None if output is None else Launch(output, self.enabled, rows, dtype)
        self.logits = self._buffer("logits", path.model.get_output_embeddings().out_features)
        block_of_logits = LOGITS_BLOCK if self.output is not None else 0
        self.best = Best.empty(rows, self.logits.shape[1], device, block=block_of_logits)

    def _buffer(self, name: str, columns: int) -> Tensor:
        """(rows, columns) of the model's dtype: the same for the same name in every block."""
        key = name, columns
        if key not in self._buffers:
            self._buffers[key] = torch.empty(self.rows, columns, dtype=self.path.dtype, device=self.path.device)
        return self._buffers[key]

    def _bind_blocks(self) -> Tensor:
        """Bind every step of every block to its buffers, in order; the squares of what the last one leaves."""
        scratch, pdl = self.scratch, self.path.pdl
        layers = iter(self.cache.layers)
        partials: AttentionPartials | None = None
        squares = self.squares
        for block in self.path.blocks:
            x: Tensor | AttentionPartials = self.hidden
            norm: Norm | None = None
            product: Product | None = None
            for step in block:
                if isinstance(step, NormOfStream):
                    norm = Norm(step.weight, step.eps, squares)
                elif isinstance(step, Attention):
                    if product is None or not isinstance(x, Tensor):
                        raise TypeError("attention reads the product of queries, keys and values")
                    layer = next(layers)
                    partials = self._partials(product, step, layer, partials)
                    self._steps.append(self._attention(step, x, layer, partials))
                    x = partials
                elif isinstance(step, Route):
                    raise TypeError("the fused path has no kernels for experts")
                else:
                    launch = Launch(step, self.enabled, self.rows, self.path.dtype)
                    self.launches.append(launch)
                    residual = step.epilogue == "residual"
                    y = self.hidden if residual else self._buffer(step.name, step.outputs)
                    self._steps.append(partial(launch.run, x, y, scratch, pdl, norm))
                    if residual:
                        squares = launch.squares
                    x, norm, product = y, None, step
        return squares

    def _partials(
        self, qkv: Product, step: Attention, layer: FixedLayer, before: AttentionPartials | None
    ) -> AttentionPartials:
        """What attention leaves for the product after it: the same memory in every block."""
        if before is None:
            kv_heads, dim = layer.keys.shape[1], layer.keys.shape[3]
            splits = attention_splits(self.rows * kv_heads)
            before = AttentionPartials.empty(self.rows, qkv.parts[0] // dim, dim, splits, self.positions)
        return replace(before, window=step.window)

    def _attention(
        self, step: Attention, qkv: Tensor, layer: FixedLayer, partials: AttentionPartials
    ) -> Callable[[], None]:
        return partial(
            decode_attention,
            qkv,
            layer.keys,
            layer.values,
            self.cos,
            self.sin,
            partials,
            scale=step.scale,
            q_norm=step.q_norm,
            k_norm=step.k_norm,
            eps=step.eps,
            pdl=self.path.pdl,
        )

    @torch.no_grad()
    def launch(self) -> Tensor:
        """As `Session.launch`; nothing waits."""
        model, pdl = self.path.model, self.path.pdl
        embed(self.token, model.get_input_embeddings().weight, self.positions, self.hidden, self.squares, pdl=pdl)
        for step in self._steps:
            step()
        if self.output is not None:
            self.output.run(self.hidden, self.logits, self.scratch, pdl, self._norm)
            find_best(self.logits, self.best, pdl=pdl)
            return self.logits
        output = model.get_output_embeddings()
        output_logits(self.hidden, self._norm, output.weight, output.bias, self.logits, self.best, pdl=pdl)
        return self.logits

    def pick(self) -> None:
        """Make the greedy choice from the last launch's logits the next launch's `token`."""
        pick(self.best, self.token, pdl=self.path.pdl)

    def _planned(self) -> list[Launch]:
        output = self.output
        return [*self.launches, *([output] if output and output.product.sparse_layers[0].is_planned else [])]

    def counted(self) -> list[Counted]:
        """As `ProgramSession.counted`: three numbers a launch."""
        return [
            Counted(
                layer.name,
                layer.in_features * layer.out_features,
                layer.in_features,
                None if launch.config.dense else len(launch.kept) * index + part,
            )
            for index, launch in enumerate(self._planned())
            for part, layer in enumerate(launch.product.sparse_layers)
        ]

    def kept(self) -> Tensor:
        """As `ProgramSession.kept`, on the device."""
        return torch.cat([launch.kept for launch in self._planned()])
