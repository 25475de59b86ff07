"""The steps of a model's blocks, bound to the buffers of one session of the fused path.

Each kind of step has a method that binds it: what it reads and writes is settled here, once, and launching it is
then a call without arguments.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from teal_cli.checkpoint.rules import ASSUMED_ZEROS, Dense
from teal_cli.decode.blocks import (
    Attention,
    BlockStep,
    Norm,
    Product,
    Scales,
    activation_of,
    growth_of,
    long_rope_from,
    program_of,
    rotary_tables,
)
from teal_cli.decode.cache import FixedLayer
from teal_cli.decode.routes import Route
from teal_cli.sparse import SparsityControl
from teal_kernels.gate_first import rounded_threshold
from teal_kernels.packed_linear import fitting
from teal_kernels.packing import Packed
from teal_kernels.triton_attention import Heads, attention_splits, decode_attention
from teal_kernels.triton_decode import write_norm
from teal_kernels.triton_gemv import Added, AttentionPartials, Beside, Positions, Scratch, gemv, squares_of
from teal_kernels.triton_gemv import Norm as FusedNorm
from teal_kernels.tuning import choose_config
from teal_kernels.tuning_entries import kind_of

_HIDDEN = "hidden"
_OTHER = "other hidden"
"""The buffers of the residual stream: of the second where it was added to as it was read."""


class FusedModel(Protocol):
    """What a session needs of the fused path (which imports it)."""

    model: Any
    control: SparsityControl
    device: torch.device
    dtype: torch.dtype
    pdl: bool
    blocks: list[list[BlockStep]]
    last_norm: Norm
    scales: Scales

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
        scale: of what it adds to the residual stream.
        sums: whether a layer norm follows.
        beside: of a product whose norm the next product adds to the stream.
    """

    def __init__(
        self,
        product: Product,
        enabled: bool,
        rows: int,
        dtype: torch.dtype,
        scale: float = 1.0,
        *,
        sums: bool = False,
        beside: Beside | None = None,
    ) -> None:
        self.product = product
        self.table, self.parts = table_of(product)
        self.beside = beside
        self.epilogue = product.epilogue
        if product.norm is not None:
            self.epilogue = "plain" if beside is None else "beside"
        self.scale = scale if self.epilogue == "residual" else 1.0
        self.activation, threshold = activation_of(product)
        self.activation_threshold = rounded_threshold(threshold, dtype)
        rules = [layer.rule if enabled else Dense() for layer in product.sparse_layers]
        if product.joined:
            rules *= 2
        values = [rule.threshold for rule in rules]
        device = self.table.device
        self.thresholds = torch.tensor(values, dtype=torch.float32, device=device)
        self.kept = torch.zeros(3, dtype=torch.int64, device=device)
        """Inputs that were kept, for each part; added to by every launch that skips."""
        expected = [ASSUMED_ZEROS if (share := rule.expected_sparsity) is None else share for rule in rules]
        skipped = sum(share * part for share, part in zip(expected, self.parts, strict=True))
        config = choose_config(
            device,
            inputs=self.table.shape[0],
            parts=self.parts,
            dtype=kind_of(self.table),
            rows=rows,
            epilogue="plain" if product.epilogue == "activated" else product.epilogue,
            sparsity=skipped / sum(self.parts),
        )
        self.config = fitting(config, self.table, rows)
        count = squares_of(self.table, self.parts, self.config, rows, dtype)
        shape = (*([2] * sums), rows, count) if beside is None else (4, count)
        self.squares = torch.empty(shape, dtype=torch.float32, device=device)
        """Partial sums of squares of what a `residual` launch wrote, for the norm that follows; of a layer norm sums,
        too. Those of a `beside` one are `Added.sums`."""

    def run(
        self,
        x: Tensor | AttentionPartials,
        y: Tensor,
        scratch: Scratch,
        pdl: bool,
        norm: FusedNorm | None = None,
        added: Added | None = None,
    ) -> None:
        """Launch it."""
        gemv(
            x,
            self.table,
            self.parts,
            self.thresholds,
            y,
            self.config,
            scratch,
            bias=self.product.bias,
            norm=norm,
            epilogue=self.epilogue,
            activation=self.activation,
            activation_threshold=self.activation_threshold,
            scale=self.scale,
            squares=self.squares if self.epilogue in ("residual", "beside") else None,
            added=added,
            beside=self.beside,
            counts=self.kept,
            pdl=pdl,
        )


def table_of(product: Product) -> tuple[Tensor | Packed, tuple[int, ...]]:
    """The table of a product as it is launched, and its parts: of a joined gate and up both, one beside the other."""
    table, parts = product.table, product.parts
    if not product.joined:
        return table, parts
    parts = (parts[0] // 2,) * 2
    return replace(table, parts=parts) if isinstance(table, Packed) else table, parts


def cannot_launch(product: Product) -> str | None:
    """Why a joined product cannot be launched as gate and up; None where it can."""
    packed = getattr(product.layers[0], "packed", None)
    if product.joined and packed is not None and product.outputs * packed.bits % 32:
        return f"codes of {product.outputs} outputs of {product.name} that end inside a word"
    return None


@dataclass(frozen=True)
class Angles:
    """The tables of a rotary embedding: of each kind (positions, R) twice; with long rope (2, positions, R)."""

    tables: dict[str | None, tuple[Tensor, Tensor]]
    long_from: int | None

    @classmethod
    def of(cls, model: Any, blocks: list[list[BlockStep]], positions: int, dtype: torch.dtype) -> "Angles":
        """As the kernels read them, for a cache of so many positions."""
        first_long = long_rope_from(model)
        lasts = [None if first_long is None else first_long - 1]
        long_from = first_long if first_long is not None and positions > first_long else None
        if long_from is not None:
            lasts.append(positions - 1)
        tables: dict[str | None, tuple[Tensor, Tensor]] = {}
        for kind in {step.angles for steps in blocks for step in steps if isinstance(step, Attention)}:
            made = [rotary_tables(model, positions, dtype, last, kind) for last in lasts]
            found = [pair for pair in made if pair is not None]
            if not found:
                continue
            cos, sin = (torch.stack([_paired(pair[of], model) for pair in found]) for of in (0, 1))
            tables[kind] = (cos, sin) if long_from is not None else (cos[0], sin[0])
        return cls(tables, long_from)


def _paired(table: Tensor, model: Any) -> Tensor:
    """The angle of each dimension of a head: transformers has those of halves where it turns neighbours."""
    if program_of(model).pairs == "neighbours":
        return table[:, : table.shape[1] // 2].repeat_interleave(2, dim=1).contiguous()
    return table


class StepBinder:
    """Binds the steps of all blocks, in order.

    Args:
        path: whose blocks they are.
        layers: of the cache, one an attention step.
        enabled: False runs products dense.
        scratch: memory that launches share.
        positions: of the rows.
        angles: of the rotary embedding.
    """

    def __init__(
        self,
        path: FusedModel,
        layers: list[FixedLayer],
        enabled: bool,
        scratch: Scratch,
        positions: Positions,
        angles: Angles,
    ) -> None:
        self.path, self.enabled, self.scratch, self.positions, self.angles = path, enabled, scratch, positions, angles
        self.rows = positions.own.shape[0]
        self.launches: list[Launch] = []
        self.steps: list[Callable[[], None]] = []
        self._growth = growth_of(path.model)
        self._neighbours = program_of(path.model).pairs != "halves"
        self._buffers: dict[tuple[str, int], Tensor] = {}
        self._layers = iter(layers)
        self.hidden = self.buffer(_HIDDEN, path.model.get_input_embeddings().weight.shape[1])
        sums = [2] * path.last_norm.centred
        self.squares = torch.empty((*sums, self.rows, 1), dtype=torch.float32, device=path.device)
        """Partial sums of squares of `hidden`, of whoever wrote it last, at first of the embedding; of models with
        layer norms (2, rows, n): sums, too."""
        self.added_squares = torch.empty_like(self.squares)
        """Of the norm that was added to it."""
        self._partials: AttentionPartials | None = None
        # What the next product reads: a buffer, and the norm that it takes up.
        self._source: Tensor | AttentionPartials | None = None
        self._norm: FusedNorm | None = None
        self._before: Product | None = None
        # Of the block: the norm before its attention, the one aside, and where in `steps` attention is launched.
        self._first_norm: FusedNorm | None = None
        self._aside: FusedNorm | None = None
        self._added: tuple[Norm, Added] | None = None
        """What the next product adds to the stream before it reads it."""
        self._attention_at = 0

    def buffer(self, name: str, columns: int) -> Tensor:
        """(rows, columns) of the model's dtype: the same for the same name in every block."""
        key = name, columns
        if key not in self._buffers:
            self._buffers[key] = torch.empty(self.rows, columns, dtype=self.path.dtype, device=self.path.device)
        return self._buffers[key]

    def bind(self) -> None:
        """Bind all of them."""
        for block in self.path.blocks:
            for step in block:
                if isinstance(step, Norm):
                    self._bind_norm(step)
                elif isinstance(step, Attention):
                    self._bind_attention(step)
                elif isinstance(step, Route):
                    raise TypeError("the fused path has no kernels for experts")
                else:
                    self._bind_product(step)

    def fused_norm(self, norm: Norm) -> FusedNorm | None:
        """Of `hidden` as it is by now, for a product that takes it up; None for none."""
        if norm.identity:
            return None
        weight = norm.weight.detach().to(self.path.device)  # of a layer norm without weights the ones are made on a CPU
        return FusedNorm(weight, norm.eps, self.squares, norm.plus_one, norm.centred, norm.bias)

    def write_norm(self, norm: Norm, name: str) -> Tensor:
        """Bind a norm of `hidden` that has a launch of its own, and a buffer."""
        self.settle()
        normed = self.buffer(name, self.hidden.shape[1])
        self.steps.append(self._writing(norm, self.hidden, normed))
        return normed

    def _writing(
        self, norm: Norm, x: Tensor, y: Tensor, added_squares: Tensor | None = None, scale: float = 1.0
    ) -> Callable[[], None]:
        return partial(
            write_norm,
            x,
            norm.weight.detach().to(self.path.device),
            y,
            eps=norm.eps,
            bias=norm.bias,
            centred=norm.centred,
            plus_one=norm.plus_one,
            added_squares=added_squares,
            scale=scale,
            pdl=self.path.pdl,
        )

    def _bind_norm(self, norm: Norm) -> None:
        if norm.aside:
            self._aside = self.fused_norm(norm)
            return
        self._source, self._norm = self.hidden, self.fused_norm(norm)
        self._first_norm = self._norm

    def _bind_attention(self, step: Attention) -> None:
        qkv, source = self._before, self._source
        if qkv is None or not isinstance(source, Tensor):
            raise TypeError("attention reads the product of queries, keys and values")
        layer = next(self._layers)
        kv_heads, dim = layer.keys.shape[1], layer.keys.shape[3]
        heads = qkv.outputs // dim - 2 * kv_heads
        if self._partials is None:  # the same memory in every block
            splits = attention_splits(self.rows * kv_heads)
            self._partials = AttentionPartials.empty(self.rows, heads, dim, splits, self.positions)
        partials = replace(self._partials, window=step.window)
        cos, sin = self.angles.tables.get(step.angles, (None, None)) if step.rotates else (None, None)
        self._attention_at = len(self.steps)
        self.steps.append(
            partial(
                decode_attention,
                source,
                layer.keys,
                layer.values,
                cos,
                sin,
                partials,
                scale=step.scale,
                q_norm=step.q_norm,
                k_norm=step.k_norm,
                eps=step.eps,
                heads=Heads(
                    norms=step.norms_of,
                    plus_one=step.plus_one,
                    neighbours=self._neighbours,
                    grouped=step.grouped,
                    cap=step.cap,
                    growth=self._growth,
                    long_from=None if cos is None else self.angles.long_from,
                ),
                pdl=self.path.pdl,
            )
        )
        self._source, self._norm = partials, None

    def _bind_product(self, step: Product) -> None:
        source, norm, at = self._source, self._norm, len(self.steps)
        if step.aside or source is None:
            # Beside the attention: launched before it, as long as `hidden` is what the norm before it was of.
            source, norm, at = self.hidden, self._aside if step.aside else self._first_norm, self._attention_at
        added = self._added[1] if self._added is not None and source is self.hidden else None
        if added is not None:
            self.hidden, self._added = added.stream, None
        launch = self._launch(step)
        to_stream = step.epilogue == "residual" and step.norm is None
        y = self.hidden if to_stream else self.buffer(step.name, step.outputs)
        self.steps.insert(at, partial(launch.run, source, y, self.scratch, self.path.pdl, norm, added))
        if step.epilogue == "residual":
            self.squares = launch.squares
            if step.norm is not None:
                self._add_later(step.norm, launch, y)
        self._source, self._norm, self._before = None if step.epilogue == "residual" else y, None, step

    def _launch(self, step: Product) -> Launch:
        beside = None
        if step.norm is not None and self.rows == 1 and not step.norm.centred:
            beside = Beside(self.hidden, step.norm.weight, step.norm.plus_one)
        scale, sums = self.path.scales.residual, self.path.last_norm.centred
        launch = Launch(step, self.enabled, self.rows, self.path.dtype, scale, sums=sums, beside=beside)
        self.launches.append(launch)
        return launch

    def _add_later(self, norm: Norm, launch: Launch, y: Tensor) -> None:
        """What the norm makes of y is added by the next product, as it reads the stream; of several rows, at once."""
        other = self.buffer(_OTHER, self.hidden.shape[1])
        stream = self.buffer(_HIDDEN, self.hidden.shape[1]) if self.hidden is other else other
        scale = self.path.scales.residual
        self._added = norm, Added(y, norm.weight, norm.eps, norm.plus_one, scale, launch.squares, stream)
        if launch.beside is None:
            self.settle()

    def settle(self) -> None:
        """Bind a launch that adds what no product has added yet."""
        if self._added is not None:
            norm, added = self._added
            self.squares, self._added = self.added_squares, None
            self.steps.append(self._writing(norm, added.y, self.hidden, self.squares, added.scale))
