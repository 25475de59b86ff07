"""What each rank holds of a model: a plan from its block program, before any weight is read.

Queries, keys, values, gate and up are cut by outputs (heads and neurons), o and down by inputs, the output layer by
the vocabulary. So a block needs two sums over ranks. The scheme is that of Megatron-LM (arXiv 1909.08053). Of experts
each rank holds a share of the neurons of every one, and so all ranks do the same work, whichever a token is sent to. A
rank's model is a transformers model of fewer heads and neurons, whose residual stream is whole.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from teal_cli.errors import UsageError
from teal_cli.models.architectures import Projection, architecture_for, find_projections, program_for
from teal_cli.models.cuts import Cut, Span, head_spans, spans_of
from teal_cli.models.likeness import layers_of, steps_of
from teal_cli.models.programs import AttentionStep, ProductStep, Program

_LANES = 16
"""Neurons that lie side by side in a rank's table: cuts elsewhere would make loads of the kernels unaligned."""
_NEURON_KEYS = "intermediate_size"
"""What the names of configuration keys end with that say how many neurons an MLP, or an expert, has."""


@dataclass(frozen=True)
class ShardPlan:
    """What one rank holds."""

    rank: int
    count: int
    heads: Span
    """Of queries."""
    kv_heads: Span
    """Of keys and values; ranks that are more than these share them."""
    head_size: int
    neurons: dict[int, Span]
    """How many an MLP or an expert has -> those that are held of it."""
    vocabulary: int
    """Of the whole model."""
    width: int
    """Logits of each rank; those of the last one may reach beyond the vocabulary, and are cut off."""
    output: str
    """Module path of the output layer."""
    cuts: dict[str, Cut] = field(default_factory=dict)
    """Path of a layer, or of a parameter that lies beside layers -> what is held of it. All others are whole."""
    sums: tuple[str, ...] = ()
    """Modules whose outputs are summed over ranks: layers, and of experts the one that weighs them."""
    weights: dict[str, int] = field(default_factory=dict)
    """Module path -> weights of the whole layer that a token reads, of each projection and of the output layer."""

    @property
    def logits(self) -> Span:
        """Of the vocabulary."""
        start = min(self.rank * self.width, self.vocabulary)
        return start, min(start + self.width, self.vocabulary)

    def cut_of(self, layer: str) -> Cut | None:
        """What is held of a layer whose weights are quantised, by module path; None for one that is whole.

        Raises:
            UsageError: an output layer whose logits ranks cannot share evenly.
        """
        if layer != self.output:
            return self.cuts.get(layer)
        if self.vocabulary % self.count:
            raise UsageError(
                f"{self.vocabulary} logits cannot be divided by {self.count} evenly: leave out quantise_output "
                "(flag --quantise-output)"
            )
        return Cut("outputs", (self.logits,))

    def cut_at(self, parameter: str) -> Cut | None:
        """What is held of a parameter, by path: of one of a layer, or of one that lies beside layers."""
        return self.cuts.get(parameter) or self.cuts.get(parameter.rpartition(".")[0])

    def sums_inputs_of(self, layer: str) -> bool:
        """Whether what a layer makes of its inputs is a part of a sum over ranks."""
        return layer in self.cuts and self.cuts[layer].side == "inputs"

    def of_output(self, weight: Any) -> Tensor:
        """(vocabulary, ...) -> (width, ...), with zeros for what lies beyond the vocabulary."""
        start, stop = self.logits
        held: Tensor = weight[start:stop]
        if stop - start == self.width:
            return held
        return torch.cat([held, held.new_zeros(self.width - len(held), *held.shape[1:])])


def _attentions_of(program: Program) -> list[AttentionStep]:
    return [step for step in program.steps if isinstance(step, AttentionStep)]


class _Planner:
    """Finds the cuts of one rank, block by block."""

    def __init__(self, model: Any, program: Program, rank: int, count: int, group: int) -> None:
        self.model, self.program, self.rank, self.count, self.group = model, program, rank, count, group
        self.row, config = architecture_for(model), model.config.get_text_config()
        self.names: dict[str, Projection] = {projection.name: projection for projection in find_projections(model)}
        self.heads = int(config.num_attention_heads)
        self.kv_heads = int(getattr(config, "num_key_value_heads", None) or self.heads)
        # Norms over all heads need all of them: then every rank has the whole attention, and no sum is behind it.
        self.divides_heads = all(step.norms_of != "all_heads" for step in _attentions_of(program))
        self.q, self.kv = (0, self.heads), (0, self.kv_heads)
        if self.divides_heads:
            self.q, self.kv = head_spans(self.heads, self.kv_heads, rank, count)
        self.dims: set[int] = set()
        self.neurons: dict[int, Span] = {}
        self.cuts: dict[str, Cut] = {}
        self.sums: list[str] = []

    def take(self, block: nn.Module, path: str) -> None:
        """The cuts of a block.

        Raises:
            ValueError: its neurons cannot be divided.
        """
        held: Span | None = None
        for step in steps_of(self.program, block):
            if isinstance(step, AttentionStep):
                held = self._take_attention(step, path)
            if not isinstance(step, ProductStep):
                continue
            layers = [f"{path}.{name}" for name in layers_of(self.row, step, block)]
            if step.epilogue == "plain":
                self._take_heads(layers)
            elif step.epilogue == "residual":
                if held is not None:
                    self._cut(layers, Cut("inputs", (held,), self.rank == 0))
                    self.sums.append(layers[0].rpartition(".")[0] if step.experts else layers[0])
            else:
                held = self._take_neurons(step, layers)

    def _take_attention(self, step: AttentionStep, path: str) -> Span | None:
        """Inputs of the product behind it that are held; None for all."""
        if not self.divides_heads:
            return None
        if step.sinks is not None:
            self.cuts[f"{path}.{step.attention}.{step.sinks}"] = Cut("outputs", (self.q,))
        dim = max(self.dims)
        return self.q[0] * dim, self.q[1] * dim

    def _take_heads(self, layers: list[str]) -> None:
        outputs = sum(self.names[name].out_features for name in layers)
        self.dims.add(outputs // (self.heads + 2 * self.kv_heads))
        if self.divides_heads:
            self.cuts |= _cut_heads(layers, self.q, self.kv, self.heads, self.kv_heads, max(self.dims))

    def _take_neurons(self, step: ProductStep, layers: list[str]) -> Span:
        size = self.names[layers[0]].out_features // (2 if step.joined else 1)
        if size not in self.neurons:
            # A share of a few neurons is better than none. Groups that share a scale are never cut.
            unit = self.group or (_LANES if size >= self.count * _LANES else 1)
            self.neurons[size] = spans_of(size, self.count, unit)[self.rank]
        start, stop = own = self.neurons[size]
        spans: tuple[Span, ...] = (own,)
        if step.joined:
            alternate = getattr(self.model.get_submodule(layers[0].rpartition(".")[0]), "interleaved", False)
            spans = ((2 * start, 2 * stop),) if alternate else (own, (size + start, size + stop))
        self._cut(layers, Cut("outputs", spans))
        return own

    def _cut(self, layers: list[str], cut: Cut) -> None:
        """Of layers; the biases of experts lie beside them."""
        for layer in layers:
            self.cuts[layer] = cut
            owner, _, own = layer.rpartition(".")
            if getattr(self.model.get_submodule(owner), f"{own}_bias", None) is not None:
                self.cuts[f"{layer}_bias"] = cut


def plan_shards(model: Any, rank: int, count: int, *, group: int = 0) -> ShardPlan:
    """What one rank holds of a model.

    Args:
        model: the whole one, or its outline.
        rank: whose part.
        count: of ranks.
        group: neurons that share scales, of quantised weights; 0 for none.

    Raises:
        UsageError: a model whose blocks cannot be divided so, or not by so many.
    """
    program = program_for(model)
    kind = f"tensor_parallel {count} (flag --tensor-parallel): model type {model.config.model_type}"
    if program is None or not architecture_for(model).is_one_decoder or program.alibi is not None:
        raise UsageError(f"{kind} has no block program whose heads can be divided")
    residual = [step for step in program.products if step.epilogue == "residual"]
    if not all(step.summed and step.input_norm is None for step in residual):  # such a norm is of all inputs
        raise UsageError(f"{kind} has products whose inputs are not divided")
    if any(step.grouped or step.keys_as_values for step in _attentions_of(program)):
        raise UsageError(f"{kind} has an attention whose heads are not divided")
    (path,) = architecture_for(model).blocks
    try:
        planner = _Planner(model, program, rank, count, group)
        for index, block in enumerate(model.get_submodule(path).children()):
            planner.take(block, f"{path}.{index}")
    except (ValueError, AttributeError) as error:
        raise UsageError(f"{kind} cannot be divided: {error}") from error
    if len(planner.dims) != 1:
        raise UsageError(f"{kind} has heads of several sizes, which are not divided")
    output = model.get_output_embeddings()
    name_of_output = next(name for name, module in model.named_modules() if module is output)
    weights = {name: projection.weights_read for name, projection in planner.names.items()}
    return ShardPlan(
        rank=rank,
        count=count,
        heads=planner.q,
        kv_heads=planner.kv,
        head_size=planner.dims.pop(),
        neurons=planner.neurons,
        vocabulary=output.out_features,
        width=-(-output.out_features // count),
        output=name_of_output,
        cuts=planner.cuts,
        sums=tuple(planner.sums),
        weights=weights | {name_of_output: output.weight.numel()},
    )


def _cut_heads(layers: list[str], q: Span, kv: Span, heads: int, kv_heads: int, dim: int) -> dict[str, Cut]:
    """Of queries, keys and values: three layers, or one in which they follow one another."""
    of_q, of_kv = ((start * dim, stop * dim) for start, stop in (q, kv))
    if len(layers) > 1:
        return {name: Cut("outputs", (of_q if nth == 0 else of_kv,)) for nth, name in enumerate(layers)}
    begins = heads * dim, (heads + kv_heads) * dim
    return {layers[0]: Cut("outputs", (of_q, *((begin + of_kv[0], begin + of_kv[1]) for begin in begins)))}


def shards_of(model: Any) -> ShardPlan | None:
    """What this process holds of a model; None where it holds all."""
    return getattr(model, "teal_shards", None)


def narrow_config(model: Any, plan: ShardPlan) -> Any:
    """The configuration of a rank's model.

    Raises:
        UsageError: it gives layers of other sizes than the plan's.
    """
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    text.num_attention_heads = plan.heads[1] - plan.heads[0]
    if getattr(text, "num_key_value_heads", None) is not None:
        text.num_key_value_heads = plan.kv_heads[1] - plan.kv_heads[0]
    for key, size in text.to_dict().items():
        if key.endswith(_NEURON_KEYS) and isinstance(size, int) and size in plan.neurons:
            setattr(text, key, plan.neurons[size][1] - plan.neurons[size][0])
    text.head_dim = plan.head_size
    config.tie_word_embeddings = text.tie_word_embeddings = True  # its output layer, for a moment: `shard_output_`
    return config


def check_shard(model: Any, whole: Any, plan: ShardPlan) -> None:
    """Refuse a rank's model that has not the layers of the plan.

    Raises:
        UsageError: its type takes the sizes of heads or neurons from elsewhere.
    """
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    output = {id(parameter) for parameter in whole.get_output_embeddings().parameters()}
    for name, parameter in whole.named_parameters():
        if id(parameter) in output:
            continue
        cut, expected = plan.cut_at(name), list(parameter.shape)
        is_bias = cut is not None and (len(expected) == 1 or name in plan.cuts)
        if cut is not None and not is_bias:
            expected[cut.axis()] = cut.size
        elif cut is not None and cut.side == "outputs":
            expected[-1] = cut.size
        if shapes.get(name) != torch.Size(expected):
            raise UsageError(
                f"tensor_parallel {plan.count} (flag --tensor-parallel): model type {model.config.model_type} cannot "
                f"be divided: {name} would not have the shape {expected}"
            )


def shard_output_(model: Any, plan: ShardPlan, tied: bool) -> nn.Linear:
    """Put an output layer of the rank's logits in the place of the whole one.

    Args:
        model: the rank's, whose output layer is tied to the embedding.
        plan: of the rank.
        tied: whether it stays so; then its weight is made when there is an embedding (`tie_output_`).
    """
    old = model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is old)
    new = nn.Linear(old.in_features, plan.width, old.bias is not None, device="meta", dtype=old.weight.dtype)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = tied
    return new


def tie_output_(model: Any, plan: ShardPlan) -> None:
    """Make the output layer's weight rows of the embedding, which is whole."""
    weight = plan.of_output(model.get_input_embeddings().weight.detach())
    model.get_output_embeddings().weight = nn.Parameter(weight, requires_grad=False)
