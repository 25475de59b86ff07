"""The steps of a model's blocks, bound to the buffers of one session of the fused path.

Each kind of step has a method that binds it: what it reads and writes is settled here, once, and launching it is
then a call without arguments.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from teal_cli.decode.blocks import Attention, Norm, Product, embedding_norm, program_of
from teal_cli.decode.cache import FixedLayer
from teal_cli.decode.paths.fused_angles import Angles
from teal_cli.decode.paths.fused_experts import Routing, router_of, scale_of
from teal_cli.decode.paths.fused_gate_first import GateFirstLaunch
from teal_cli.decode.paths.fused_heads import heads_of, weight_of_norms
from teal_cli.decode.paths.fused_launch import Launch
from teal_cli.decode.paths.fused_model import FusedModel
from teal_cli.decode.paths.fused_ranks import Summed, Sums
from teal_cli.decode.paths.fused_routed import RoutedLaunch
from teal_cli.decode.positions import alibi_bias, growth_of
from teal_cli.decode.routes import Route
from teal_cli.decode.row_levels import RowLevels
from teal_kernels.operands import Added, AttentionPartials, Beside, Positions, Scratch
from teal_kernels.operands import Norm as FusedNorm
from teal_kernels.triton_attention import attention_splits, decode_attention
from teal_kernels.triton_decode import write_norm, write_norm_of_partials
from teal_kernels.triton_ranks import squares_of_sum
from teal_kernels.triton_router import route

_HIDDEN = "hidden"
_EMBEDDED = "embedded"
_OTHER = "other hidden"
"""The buffers of the residual stream: of the second where it was added to as it was read."""


RowsLaunch = GateFirstLaunch | RoutedLaunch
"""Of MLPs of which some neurons are read."""


class StepBinder:
    """Binds the steps of all blocks, in order.

    Args:
        path: whose blocks they are.
        layers: of the cache, one an attention step.
        enabled: False runs products dense.
        scratch: memory that launches share.
        positions: of the rows.
        angles: of the rotary embedding.
        levels: of which each row has one, where they are not all of one.
        span: rows of one sequence, whose tokens follow each other.
        sums: over ranks, where several hold the model.
    """

    def __init__(
        self,
        path: FusedModel,
        layers: list[FixedLayer],
        enabled: bool,
        scratch: Scratch,
        positions: Positions,
        angles: Angles,
        levels: RowLevels | None = None,
        span: int = 1,
        sums: Sums | None = None,
    ) -> None:
        self._levels, self._span, self._sums = levels, span, sums
        self.path, self.enabled, self.scratch, self.positions, self.angles = path, enabled, scratch, positions, angles
        self.rows = positions.own.shape[0]
        self.launches: list[Launch | RowsLaunch] = []
        self.steps: list[Callable[[], object]] = []
        self._growth = growth_of(path.model)
        self._neighbours = program_of(path.model).pairs.startswith("neighbours")
        self._alibi: dict[tuple[int, float], Tensor | None] = {}
        self._buffers: dict[tuple[str, int], Tensor] = {}
        self._layers = iter(layers)
        self.hidden = self.buffer(_HIDDEN, path.model.get_input_embeddings().weight.shape[1])
        kinds = [2] * path.last_norm.centred
        self.squares = torch.empty((*kinds, self.rows, 1), dtype=torch.float32, device=path.device)
        """Partial sums of squares of `hidden`, of whoever wrote it last, at first of the embedding; of models with
        layer norms (2, rows, n): sums, too."""
        self.added_squares = torch.empty_like(self.squares)
        """Of the norm that was added to it."""
        self.embedded = self.hidden
        """Where a token's embedding goes."""
        if (norm := embedding_norm(path.model)) is not None:
            self.embedded = self.buffer(_EMBEDDED, self.hidden.shape[1])
            self.steps.append(self._writing(norm, self.embedded, self.hidden, self.squares))
        self._partials: dict[tuple[int, int], AttentionPartials] = {}
        # What the next product reads: a buffer, and the norm that it takes up.
        self._source: Tensor | AttentionPartials | None = None
        self._norm: FusedNorm | None = None
        self._before: Product | None = None
        # Of the block: the norm before its attention or router, the one aside, and where in `steps` that is launched.
        self._first_norm: FusedNorm | None = None
        self._aside: FusedNorm | None = None
        self._added: tuple[Norm, Added] | None = None
        """What the next product adds to the stream before it reads it."""
        self._attention_at = 0
        self._routing: Routing | None = None

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
                    self._bind_route(step, scale_of(block))
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
        self,
        norm: Norm | FusedNorm,
        x: Tensor,
        y: Tensor,
        squares: Tensor | None = None,
        *,
        added: bool = False,
        scale: float = 1.0,
        stream_scale: float = 1.0,
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
            squares=squares,
            added=added,
            scale=scale,
            stream_scale=stream_scale,
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
        heads = qkv.outputs // dim - kv_heads * (1 if step.keys_as_values else 2)
        if (kv_heads, dim) not in self._partials:  # the same memory in every block that is alike
            splits = attention_splits(self.rows * kv_heads)
            self._partials[kv_heads, dim] = AttentionPartials.empty(self.rows, heads, dim, splits, self.positions)
        partials = replace(self._partials[kv_heads, dim], window=step.window)
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
                q_norm=weight_of_norms(step.q_norms),
                k_norm=weight_of_norms(step.k_norms),
                eps=step.eps,
                heads=heads_of(
                    step,
                    neighbours=self._neighbours,
                    growth=self._growth,
                    long_from=None if cos is None else self.angles.long_from,
                    alibi=self._alibi_of(heads, layer.keys.shape[2], step.scale),
                ),
                span=self._span,
                pdl=self.path.pdl,
            )
        )
        self._source, self._norm = partials, None

    def _alibi_of(self, heads: int, positions: int, scale: float) -> Tensor | None:
        """One table for all blocks that are alike."""
        key = heads, scale
        if key not in self._alibi:
            bias = alibi_bias(self.path.model, positions, heads, scale)
            self._alibi[key] = None if bias is None else bias.to(self.path.device).contiguous()
        return self._alibi[key]

    def _bind_route(self, step: Route, scale: nn.Linear | None) -> None:
        """What it reads the experts read too, so that stays the source of the next product."""
        source, self._attention_at = self._source, len(self.steps)
        if not isinstance(source, Tensor):
            raise TypeError("a router reads a norm of the residual stream")
        if self._routing is None or self._routing.chosen.ids.shape[1] != step.top_k:
            self._routing = Routing.empty(self.rows, step.top_k, self.path.device)
        self.steps.append(
            partial(
                route,
                source,
                router_of(step, scale),
                self._routing.chosen,
                self.scratch,
                norm=self._norm,
                aside_share=None if scale is None else self._routing.every_tokens.weights,
                pdl=self.path.pdl,
            )
        )

    def _bind_product(self, step: Product) -> None:
        source, norm, at = self._source, self._norm, len(self.steps)
        if step.aside or source is None:
            # Beside attention or experts: launched before, as long as `hidden` is what the norm before them was of.
            source, norm, at = self.hidden, self._aside if step.aside else self._first_norm, self._attention_at
        by_rows = self._by_rows(step)
        if by_rows is not None and isinstance(source, Tensor):
            y = self._bind_rows(step, by_rows, source, norm, at)
            self._source, self._norm, self._before = y, None, step
            return
        if step.input_norm is not None:
            source, norm, at = self._written_input(step, step.input_norm, source), None, len(self.steps)
        added = self._added[1] if self._added is not None and source is self.hidden else None
        if added is not None:
            self.hidden, self._added = added.stream, None
        launch = self._launch(step)
        if self._sums is not None and self.path.is_summed(step):
            self._bind_summed(step, self._sums, launch, partial(launch.run, source), norm, added, at)
            return
        to_stream = step.epilogue == "residual" and step.norm is None
        y = self.hidden
        if not to_stream:  # of experts a row each
            y = self.buffer(step.name, step.outputs * launch.times).view(-1, step.outputs)
        self.steps.insert(at, partial(launch.run, source, y, self.scratch, self.path.pdl, norm, added))
        if step.epilogue == "residual":
            self.squares = launch.squares
            if step.norm is not None:
                self._add_later(step.norm, launch, y, 1.0 if step.stream_scale is None else float(step.stream_scale))
        self._source, self._norm, self._before = None if step.epilogue == "residual" else y, None, step

    def _bind_summed(
        self,
        step: Product,
        sums: Sums,
        launch: Launch,
        run: Callable[..., None],
        norm: FusedNorm | None,
        added: Added | None,
        at: int,
    ) -> None:
        """A residual product of which each rank has some inputs: the sum over ranks has its epilogue."""
        own, size = sums.buffer(step.outputs, self.path.dtype), step.outputs
        if step.norm is None:
            of_sums = (*([2] * self.path.last_norm.centred), self.rows, squares_of_sum(size))
            self.squares = torch.empty(of_sums, dtype=torch.float32, device=self.path.device)
            into = Summed(self.hidden, added=True, scale=self.path.scales.residual, squares=self.squares)
        else:
            into = Summed(self.buffer(step.name, size))
        empty = [own.zero_] if launch.epilogue == "residual" else []
        self.steps[at:at] = [*empty, partial(run, own, self.scratch, self.path.pdl, norm, added), *sums.sum(own, into)]
        if step.norm is not None:
            self._add_later(step.norm, launch, into.y, 1.0 if step.stream_scale is None else float(step.stream_scale))
        self._source, self._norm, self._before = None, None, step

    def _written_input(self, step: Product, norm: Norm, source: Tensor | AttentionPartials) -> Tensor:
        """Bind the norm of what a residual product reads, which has a launch and a buffer of its own."""
        normed = self.buffer(f"{step.name} normed", step.layers[0].in_features)
        if isinstance(source, Tensor):
            self.steps.append(self._writing(norm, source, normed))
            return normed
        self.steps.append(
            partial(
                write_norm_of_partials,
                source,
                norm.weight.detach(),
                normed,
                eps=norm.eps,
                bias=norm.bias,
                centred=norm.centred,
                plus_one=norm.plus_one,
                pdl=self.path.pdl,
            )
        )
        return normed

    def _by_rows(self, step: Product) -> RowsLaunch | None:
        """Of gate and up of an MLP that decodes gate first, or is routed."""
        if step.gate_first is not None:
            return GateFirstLaunch(step.gate_first, self.enabled, self.rows, self.path.dtype)
        if step.routed is not None:
            return RoutedLaunch(step, step.routed, self.enabled, self.rows, self.path.dtype)
        return None

    def _bind_rows(self, step: Product, launch: RowsLaunch, source: Tensor, norm: FusedNorm | None, at: int) -> Tensor:
        """A launch of rows of gate and up, which adds nothing to the stream and takes up no layer norm."""
        if self._added is not None and source is self.hidden:
            self.settle()
            norm, at = None if norm is None else replace(norm, squares=self.squares), len(self.steps)
        if norm is not None and norm.centred:
            normed = self.buffer("normed", step.layers[0].in_features)
            self.steps.insert(at, self._writing(norm, source, normed))
            source, norm, at = normed, None, at + 1
        self.launches.append(launch)
        y = self.buffer(step.name, step.outputs)
        self.steps.insert(at, partial(launch.run, source, y, self.path.pdl, norm))
        return y

    def _launch(self, step: Product) -> Launch:
        beside = None
        alone = self._sums is None
        if alone and step.norm is not None and self.rows == 1 and not step.norm.centred and step.stream_scale is None:
            beside = Beside(self.hidden, step.norm.weight, step.norm.plus_one)
        scale, sums = self.path.scales.residual, self.path.last_norm.centred
        options: dict[str, Any] = {"sums": sums, "beside": beside, "routing": self._routing, "levels": self._levels}
        options["summed"] = not alone and self.path.is_summed(step)
        launch = Launch(step, self.enabled, self.rows, self.path.dtype, scale, **options)
        self.launches.append(launch)
        return launch

    def _add_later(self, norm: Norm, launch: Launch, y: Tensor, stream_scale: float) -> None:
        """What the norm makes of y is added by the next product, as it reads the stream; of several rows, at once."""
        other = self.buffer(_OTHER, self.hidden.shape[1])
        stream = self.buffer(_HIDDEN, self.hidden.shape[1]) if self.hidden is other else other
        scale = self.path.scales.residual
        self._added = norm, Added(y, norm.weight, norm.eps, norm.plus_one, scale, launch.squares, stream)
        if launch.beside is None:
            self.settle(stream_scale)

    def settle(self, stream_scale: float = 1.0) -> None:
        """Bind a launch that adds what no product has added yet, and multiplies the stream then."""
        if self._added is not None:
            norm, added = self._added
            self.squares, self._added = self.added_squares, None
            self.steps.append(
                self._writing(
                    norm,
                    added.y,
                    self.hidden,
                    self.squares,
                    added=True,
                    scale=added.scale,
                    stream_scale=stream_scale,
                )
            )
