"""A model's block program as the native library takes it: structures that point into the model's own tensors."""

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from teal_cli.checkpoint.rules import ASSUMED_ZEROS, Dense, Rule
from teal_cli.decode.activations import activation_of, curve_of
from teal_cli.decode.blocks import (
    Attention,
    BlockStep,
    Norm,
    Product,
    embedding_norm,
    joined_bias,
    program_of,
)
from teal_cli.decode.paths.native_tables import Sources, is_gapless, joined_norms, weights_of
from teal_cli.decode.paths.program_session import Counted
from teal_cli.decode.positions import alibi_bias, growth_of, learned_positions, rotary_module
from teal_cli.decode.routes import Route
from teal_cli.decode.row_levels import RowLevels, most_expected
from teal_cli.decode.scales import scales_of
from teal_cli.sparse import SparseLinear
from teal_cli.sparse.experts import SparseExperts
from teal_cli.sparse.gate_first import GateFirstMLP
from teal_cli.sparse.routed import RoutedMLP
from teal_kernels import KEEP_ALL
from teal_kernels.native import structures as native
from teal_kernels.native.experts import product_of_experts, route_of, weight_of_experts
from teal_kernels.packing import Packed

_ACTIVATIONS = {
    None: native.Activation.SILU,
    "silu": native.Activation.SILU,
    "gelu": native.Activation.GELU,
    "gelu_tanh": native.Activation.GELU_TANH,
    "relu": native.Activation.RELU,
    "relu2": native.Activation.RELU2,
    "fatrelu": native.Activation.FATRELU,
    "drelu": native.Activation.DRELU,
    "xielu": native.Activation.XIELU,
    "clamped_swiglu": native.Activation.CLAMPED_SWIGLU,
}
_HEAD_NORMS = {
    "heads": native.HeadNorms.HEADS_FIRST,
    "rotated_heads": native.HeadNorms.HEADS_LAST,
    "all_heads": native.HeadNorms.ALL_HEADS,
}
_SCORES = {"softmax": native.Scores.SOFTMAX, "sparsemixer": native.Scores.SPARSEMIXER}
_EPILOGUES = {
    "plain": native.Epilogue.PLAIN,
    "gated": native.Epilogue.GATED,
    "activated": native.Epilogue.ACTIVATED,
    "residual": native.Epilogue.RESIDUAL,
}


class NativeProgram:
    """What the library computes for a token of a model, under the plan that the model has now.

    Args:
        model: on the CPU. Its weights are laid out for their rules.
        blocks: its steps.
        last_norm: in front of its output layer.
        sparse: False drops nothing.
        levels: of which each row has one; by default all rows have the rules of the layers.
    """

    def __init__(
        self,
        model: Any,
        blocks: Iterable[Iterable[BlockStep]],
        last_norm: Norm,
        *,
        sparse: bool,
        levels: RowLevels | None = None,
    ) -> None:
        self._model, self._sparse, self._levels = model, sparse, levels
        self._biases: dict[tuple[int, int, float], Tensor | None] = {}
        program = program_of(model)
        self._scales, self._pairs = scales_of(model, program), program.pairs
        self._growth = growth_of(model)
        self.counted: list[Counted] = []
        """Projections that are planned."""
        self.counters = 0
        """Numbers of kept inputs that the library writes."""
        self.copied: list[Tensor] = []
        """Norms, biases and the like that the library does not read where they lie, but in another dtype or joined."""
        self._steps: list[native.Norm | native.Product | native.Route | tuple[Attention, int]] = []
        outputs = top_k = 0
        for step in (step for block in blocks for step in block):
            if isinstance(step, Norm):
                self._steps.append(self._norm_of(step))
            elif isinstance(step, Attention):
                for norm in (*step.q_norms, *step.k_norms, *step.v_norms):
                    self._note_copies((norm.weight, None), (norm.bias, None))
                self._note_copies((step.sinks, None))
                self._steps.append((step, outputs))
            elif isinstance(step, Route):
                self._steps.append(self._route(step))
                top_k = step.top_k
            elif step.experts:
                self._steps.append(self._experts(step, top_k))
            else:
                self._steps.append(self._product(step))
                outputs = step.outputs
        if program.rotary is not None:
            rotary = rotary_module(model, program.rotary)
            buffers = [rotary] if isinstance(rotary, Tensor) else rotary.buffers()
            self._note_copies(*((buffer, None) for buffer in buffers))
        self._norm = self._norm_of(last_norm)
        first_norm = embedding_norm(model)
        self._embedding_norm = None if first_norm is None else self._norm_of(first_norm)
        self._output = self._product(Product("output", (model.get_output_embeddings(),), "plain"))
        self._embedding = native.weight_of(model.get_input_embeddings().weight.detach())
        learned = learned_positions(model)
        self._positions = None if learned is None else native.weight_of(learned[0])
        self._offset = 0 if learned is None else learned[1]
        self.sources = Sources(model, self.copied)

    def on(
        self,
        caches: Sequence[tuple[Tensor, Tensor]],
        rotary: Mapping[str | float | None, tuple[Tensor, Tensor]],
    ) -> native.Program:
        """The program of the rows of a cache.

        Args:
            caches: keys and values of each attention, as `NativeLayer` has them.
            rotary: of each kind of angles, cosines and sines of every position, (positions, rotated size) float32 each.
        """
        self._biases.clear()  # of caches of other lengths
        of_attentions = iter(caches)
        steps = [
            self._attention(*step, *next(of_attentions), rotary) if isinstance(step, tuple) else step
            for step in self._steps
        ]
        return native.program_of(
            steps,
            embedding=self._embedding,
            output=self._output,
            norm=self._norm,
            embedding_norm=self._embedding_norm,
            position_embedding=self._positions,
            position_offset=self._offset,
            embedding_scale=self._scales.embedding / self._scales.residual,
            logits_scale=self._scales.logits,
            logits_cap=self._scales.logits_cap,
            counters=self.counters,
        )

    def _attention(
        self,
        step: Attention,
        outputs: int,
        keys: Tensor,
        values: Tensor,
        rotary: Mapping[str | float | None, tuple[Tensor, Tensor]],
    ) -> native.Attention:
        """Attention over one layer of the cache; `outputs` are those of the product before it."""
        kv_heads, positions, dim = values.shape[1:]
        heads = outputs // dim - kv_heads * (1 if step.keys_as_values else 2)
        growth = norms = biases = None
        centred = False
        if step.q_norms and step.k_norms:
            norms, centred = (joined_norms(step.q_norms), joined_norms(step.k_norms)), step.q_norms[0].centred
            if step.q_norms[0].bias is not None:
                biases = (joined_norms(step.q_norms, bias=True), joined_norms(step.k_norms, bias=True))
        if self._growth is not None:
            beta, every = self._growth
            growth = 1 + beta * torch.log(1 + torch.floor(torch.arange(positions) / every))
        return native.attention_of(
            keys,
            values,
            heads=heads,
            scale=step.scale,
            rotary=rotary.get(step.angles) if step.rotates else None,
            head_norms=norms,
            head_biases=biases,
            norm_kind=native.NormKind.LAYER_NORM if centred else native.NormKind.RMS_NORM,
            eps=step.eps,
            window=step.window,
            cap=step.cap,
            query_scale=growth,
            neighbours=self._pairs.startswith("neighbours"),
            norms=_HEAD_NORMS[step.norms_of],
            grouped=step.grouped,
            clip=step.clip,
            keys_as_values=step.keys_as_values,
            value_norm=joined_norms(step.v_norms) if step.v_norms else None,
            bias=self._alibi(heads, positions, step.scale),
            sinks=step.sinks,
        )

    def _alibi(self, heads: int, positions: int, scale: float) -> Tensor | None:
        """What ALiBi adds to scores, one table for all blocks that are alike."""
        key = heads, positions, scale
        if key not in self._biases:
            self._biases[key] = alibi_bias(self._model, positions, heads, scale)
        return self._biases[key]

    def _note_copies(self, *tensors: tuple[Tensor | None, int | None]) -> None:
        """Of tensors, and where the library reads their values."""
        self.copied += [tensor for tensor, at in tensors if tensor is not None and tensor.data_ptr() != at]

    def _norm_of(self, norm: Norm, residual: float | None = None) -> native.Norm:
        """`residual`: the scale of the stream that it reads; by default the one that the model's own is divided by."""
        if norm.identity:
            made = native.no_norm()
            made.aside = norm.aside
            return made
        kind = native.NormKind.LAYER_NORM if norm.centred else native.NormKind.RMS_NORM
        weight = norm.weight.detach().float() + 1 if norm.plus_one else norm.weight
        # Not what is added is scaled, but the whole stream by the inverse, which norms take away: epsilon apart.
        eps = norm.eps / (self._scales.residual if residual is None else residual) ** 2
        made = native.norm_of(weight, eps, bias=norm.bias, kind=kind)
        made.aside = norm.aside
        self._note_copies((norm.weight, made.weight), (norm.bias, made.bias))
        return made

    def _product(self, product: Product) -> native.Product:
        activation, threshold = activation_of(product)
        gate_first, router = product.gate_first, None
        if product.routed is not None:
            epilogue, parts = native.Epilogue.ROUTED, self._routed(product.routed)
            router = self._router(product.routed)
        elif gate_first is not None and self._sparse:
            epilogue, parts = native.Epilogue.GATE_FIRST, self._gate_first(gate_first)
        else:
            epilogue = _EPILOGUES[product.epilogue]
            parts = [self._part(layers) for layers in self._together(product)]
            if product.joined:
                parts = list(native.halves_of(parts[0]))
        norm, input_norm = (
            None if own is None else self._norm_of(own, 1.0) for own in (product.norm, product.input_norm)
        )
        made = native.product_of(
            parts,
            epilogue,
            activation=_ACTIVATIONS[activation],
            activation_threshold=threshold,
            curve=self._curve(product),
            norm=norm,
            input_norm=input_norm,
            router=router,
        )
        made.aside = product.aside
        if product.stream_scale is not None:
            self._note_copies((product.stream_scale, None))
            made.stream_scale = float(product.stream_scale)
        if product.scaled_by is not None:
            scale = native.rows_of(product.scaled_by.weight.detach(), joined_bias((product.scaled_by,)))
            self._note_copies((product.scaled_by.bias, scale.bias))
            made.scaled_by = ctypes.addressof(scale)
            made.holds += (scale,)
        return made

    def _curve(self, product: Product) -> tuple[float, ...]:
        if product.activation_module is not None:
            xielu: Any = product.activation_module
            self._note_copies(*((getattr(xielu, name).detach(), None) for name in ("alpha_p", "alpha_n", "beta")))
        return curve_of(product)

    def _route(self, route: Route) -> native.Route:
        bias = None if route.bias is None else route.bias.detach()
        router = native.rows_of(route.weight.detach(), bias)
        self._note_copies((route.bias, router.bias))
        scores = _SCORES[route.scores]
        return route_of(router, route.top_k, scores=scores, normalised=route.normalised, jitter=route.jitter)

    def _experts(self, product: Product, top_k: int) -> native.Product:
        """Of each token `top_k` experts, all with the rule of their one layer."""
        layer = cast(SparseExperts, product.layers[0])
        layer.merged.lay_out_()
        experts, outputs, inputs = layer.copies, layer.out_features, layer.in_features
        rules, counter = self._rules(layer), self._counter(layer)
        if layer.is_planned:
            self.counted.append(Counted(layer.name, top_k * outputs * inputs, top_k * inputs, counter))
        bias = getattr(product.owner, f"{layer.name.rpartition('.')[2]}_bias", None)
        weight = weight_of_experts(
            layer.weight.detach() if layer.packed is None else layer.packed,
            bias=bias,
            threshold=[rule.threshold for rule in rules],
            expected=most_expected(rules),
            counter=-1 if counter is None else counter,
        )
        self._note_copies((bias, weight.bias))
        if layer.packed is not None:
            self._note_copies((layer.packed.scales, weight.scales), (layer.packed.zeros, weight.zeros))
        activation, threshold = activation_of(product)
        kind = _ACTIVATIONS[activation]
        return product_of_experts(
            weight,
            experts,
            _EPILOGUES[product.epilogue],
            activation=kind,
            activation_threshold=threshold,
            alpha=getattr(product.owner, "alpha", 0.0),
            interleaved=product.joined and getattr(product.owner, "interleaved", False),
        )

    def _together(self, product: Product) -> list[tuple[nn.Linear, ...]]:
        """Layers that can be read as one: side by side in one table, and alike in what they skip."""
        layers = product.layers
        for layer in layers:
            if isinstance(layer, SparseLinear):
                layer.merged.lay_out_()  # plans that were only set, and not applied, have left that to whom decodes
        alone: list[tuple[nn.Linear, ...]] = [(layer,) for layer in layers]
        first = layers[0]
        if product.epilogue != "plain" or len(layers) == 1 or not isinstance(first, SparseLinear):
            return alone
        merged, rules = first.merged, {self._rules(layer) for layer in layers}
        one = len(rules) == 1 and merged.are_all(layers) and merged.one_table and is_gapless(merged.table)
        return [layers] if one else alone

    def _part(self, layers: tuple[nn.Linear, ...]) -> native.Weight:
        rules, counter, weights = self._rules(layers[0]), self._counter(layers[0]), weights_of(layers)
        for layer in layers:
            if isinstance(layer, SparseLinear) and layer.is_planned:
                size = layer.in_features * layer.out_features
                self.counted.append(Counted(layer.name, size, layer.in_features, counter))
        made = native.weight_of(
            weights,
            bias=joined_bias(layers),
            threshold=[rule.threshold for rule in rules],
            expected=most_expected(rules),
            counter=-1 if counter is None else counter,
        )
        self._note_copies(*((layer.bias, made.bias) for layer in layers))
        if isinstance(weights, Packed):
            self._note_copies((weights.scales, made.scales), (weights.zeros, made.zeros))
        return made

    def _rules(self, layer: nn.Linear) -> tuple[Rule, ...]:
        """By which it skips inputs: one, or where rows have levels of their own one of each."""
        if not self._sparse or not isinstance(layer, SparseLinear):
            return (Dense(),)
        return (layer.rule,) if self._levels is None else self._levels.of(layer)

    def _counter(self, layer: nn.Linear) -> int | None:
        """Where the library counts the kept inputs of a layer, or of several with its rules; None for none."""
        if all(isinstance(rule, Dense) for rule in self._rules(layer)):
            return None
        self.counters += 1
        return self.counters - 1

    def _router(self, mlp: RoutedMLP) -> native.Router:
        """All neurons are computed where nothing is to be skipped; what is left out is zero all the same."""
        router, first = mlp.router, mlp.router.first
        self._note_copies((router.bias, None))
        return native.router_of(
            None if first is None else first.detach(),
            router.weight.detach(),
            router.bias.detach(),
            mlp.group,
            whole=not self._sparse,
        )

    def _routed(self, mlp: RoutedMLP) -> list[native.Weight]:
        """Gate and up, of which the neurons of groups that are left out count as dropped: outputs, not inputs."""
        counters = (self.counters, self.counters + 1) if self._sparse else (None, None)
        self.counters += 2 if self._sparse else 0
        return self._rows(mlp, counters)

    def _gate_first(self, mlp: GateFirstMLP) -> list[native.Weight]:
        """Gate and up, of which the neurons that are dead count as dropped: outputs, not inputs."""
        self.counters += 1
        return self._rows(mlp, (None, self.counters - 1))

    def _rows(self, mlp: GateFirstMLP | RoutedMLP, counters: tuple[int | None, ...]) -> list[native.Weight]:
        """Gate and up row by row, with the counters of neurons that are kept."""
        parts = []
        for layer, name, of_layer in zip(mlp.layers[:2], mlp.names[:2], counters, strict=True):
            size = layer.in_features * layer.out_features
            self._note_copies((layer.bias, None))
            self.counted.append(Counted(f"{mlp.path}.{name}", size, layer.out_features, of_layer))
            parts.append(
                native.weight_of(
                    layer.weight.detach(),
                    bias=joined_bias((layer,)),
                    threshold=KEEP_ALL,
                    expected=0.0 if of_layer is None else ASSUMED_ZEROS,
                    counter=-1 if of_layer is None else of_layer,
                )
            )
        return parts
