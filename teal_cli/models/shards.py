"""What each rank holds of a model: a plan from its block program, before any weight is read.

Queries, keys, values, gate and up are cut by outputs (heads and neurons), o and down by inputs, the output layer by
the vocabulary. So a block needs two sums over ranks. The scheme is that of Megatron-LM (arXiv 1909.08053). A rank's
model is a transformers model of fewer heads and neurons, whose residual stream is whole.
"""

import copy
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from teal_cli.errors import UsageError
from teal_cli.models.architectures import architecture_for, find_projections, program_for
from teal_cli.models.layers import Experts, StackedLinear
from teal_cli.models.likeness import layers_of, steps_of
from teal_cli.models.programs import AttentionStep, ProductStep

Span = tuple[int, int]
"""From the first on, up to the second, which is no longer a part."""
_LANES = 16
"""Neurons that lie side by side in a rank's table: cuts elsewhere would make loads of the kernels unaligned."""


@dataclass(frozen=True)
class Cut:
    """What one rank holds of a linear layer, by outputs or by inputs: these spans, side by side."""

    side: Literal["outputs", "inputs"]
    spans: tuple[Span, ...]
    first: bool = True
    """Whether the rank is the first, which alone adds the bias of a layer that is cut by inputs."""

    @property
    def size(self) -> int:
        """Outputs or inputs that are held."""
        return sum(stop - start for start, stop in self.spans)

    def of_weight(self, weight: Any) -> Tensor:
        """(out, in), a tensor or a slice of a file that is read so far only -> what is held of it."""
        if self.side == "outputs":
            return torch.cat([weight[start:stop] for start, stop in self.spans])
        return torch.cat([weight[:, start:stop] for start, stop in self.spans], dim=1)

    def of_bias(self, bias: Any) -> Tensor:
        """(out,) -> what is held of it; zeros where another rank adds it."""
        if self.side == "outputs":
            return torch.cat([bias[start:stop] for start, stop in self.spans])
        whole: Tensor = bias[:]
        return whole if self.first else torch.zeros_like(whole)


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
    neurons: Span
    vocabulary: int
    """Of the whole model."""
    width: int
    """Logits of each rank; those of the last one may reach beyond the vocabulary, and are cut off."""
    cuts: dict[str, Cut] = field(default_factory=dict)
    """Module path -> what is held of it. All other layers are whole."""
    sums: tuple[str, ...] = ()
    """Layers whose outputs are summed over ranks."""
    weights: dict[str, int] = field(default_factory=dict)
    """Module path -> weights of the whole layer, of each projection and of the output layer."""

    @property
    def logits(self) -> Span:
        """Of the vocabulary."""
        start = min(self.rank * self.width, self.vocabulary)
        return start, min(start + self.width, self.vocabulary)

    def cut_of(self, layer: str) -> Cut:
        """What is held of a layer whose weights are quantised, by module path; the output layer is none of `cuts`.

        Raises:
            UsageError: an output layer whose logits ranks cannot share evenly.
        """
        if layer in self.cuts:
            return self.cuts[layer]
        if self.vocabulary % self.count:
            raise UsageError(
                f"{self.vocabulary} logits cannot be divided by {self.count} evenly: leave out quantise_output "
                "(flag --quantise-output)"
            )
        return Cut("outputs", (self.logits,))

    def of_output(self, weight: Any) -> Tensor:
        """(vocabulary, ...) -> (width, ...), with zeros for what lies beyond the vocabulary."""
        start, stop = self.logits
        held: Tensor = weight[start:stop]
        if stop - start == self.width:
            return held
        return torch.cat([held, held.new_zeros(self.width - len(held), *held.shape[1:])])


def spans_of(size: int, count: int, unit: int = 1) -> list[Span]:
    """Divide so many into as equal parts as whole units allow, larger ones first; the last unit may be shorter.

    Raises:
        ValueError: fewer units than parts.
    """
    units = -(-size // unit)
    if units < count:
        raise ValueError(f"{size} in units of {unit} cannot be divided by {count}")
    bounds = [min(unit * (units // count * part + min(part, units % count)), size) for part in range(count + 1)]
    return list(pairwise(bounds))


def head_spans(heads: int, kv_heads: int, rank: int, count: int) -> tuple[Span, Span]:
    """The heads of one rank: of queries, and the keys and values that they read.

    Raises:
        ValueError: they cannot be divided so that each query head finds its key head.
    """
    if kv_heads >= count:
        start, stop = spans_of(kv_heads, count)[rank]
        group = heads // kv_heads
        return (start * group, stop * group), (start, stop)
    if heads % count or count % kv_heads:
        raise ValueError(f"{heads} heads and {kv_heads} key heads cannot be divided by {count}")
    each, own = heads // count, rank * kv_heads // count
    return (rank * each, (rank + 1) * each), (own, own + 1)


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
    config, program = model.config.get_text_config(), program_for(model)
    kind = f"tensor_parallel {count} (flag --tensor-parallel): model type {model.config.model_type}"
    if program is None or not architecture_for(model).is_one_decoder or program.alibi is not None:
        raise UsageError(f"{kind} has no block program whose heads can be divided")
    if any(isinstance(module, Experts | StackedLinear) for module in model.modules()):
        raise UsageError(f"{kind} has experts, which are not divided")
    residual = [step for step in program.products if step.epilogue == "residual"]
    if not all(step.summed and step.input_norm is None for step in residual):  # such a norm is of all inputs
        raise UsageError(f"{kind} has products whose inputs are not divided")
    names = {projection.name: projection for projection in find_projections(model)}
    path = architecture_for(model).blocks[0]
    first, *_ = blocks = list(model.get_submodule(path).children())
    attention = next(step for step in steps_of(program, first) if isinstance(step, AttentionStep))
    if attention.grouped or attention.norms_of == "all_heads" or attention.sinks or attention.keys_as_values:
        raise UsageError(f"{kind} has an attention whose heads are not divided")
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    try:
        q, kv = head_spans(heads, kv_heads, rank, count)
        size = int(config.intermediate_size)
        unit = group or _LANES
        neurons = spans_of(size, count, unit if size >= count * unit or group else 1)[rank]
    except (ValueError, AttributeError) as error:
        raise UsageError(f"{kind} cannot be divided: {error}") from error
    output = model.get_output_embeddings()
    cuts: dict[str, Cut] = {}
    sums, dims = [], set()
    for index, block in enumerate(blocks):
        before: ProductStep | AttentionStep | None = None
        for step in steps_of(program, block):
            if isinstance(step, AttentionStep):
                before = step
            if not isinstance(step, ProductStep):
                continue
            layers = [f"{path}.{index}.{name}" for name in layers_of(architecture_for(model), step, block)]
            if step.epilogue == "plain":
                dims.add(sum(names[name].out_features for name in layers) // (heads + 2 * kv_heads))
                cuts |= _cut_heads(layers, q, kv, heads, kv_heads, max(dims))
            elif step.epilogue == "residual":
                span = tuple(bound * max(dims) for bound in q) if isinstance(before, AttentionStep) else neurons
                cuts[layers[0]] = Cut("inputs", ((span[0], span[1]),), rank == 0)
                sums.append(layers[0])
            else:
                spans = (neurons, (size + neurons[0], size + neurons[1])) if step.joined else (neurons,)
                cuts |= dict.fromkeys(layers, Cut("outputs", spans))
            before = step
    if len(dims) != 1:
        raise UsageError(f"{kind} has heads of several sizes, which are not divided")
    weights = {name: projection.in_features * projection.out_features for name, projection in names.items()}
    weights |= {name: output.weight.numel() for name, module in model.named_modules() if module is output}
    return ShardPlan(
        rank=rank,
        count=count,
        heads=q,
        kv_heads=kv,
        head_size=dims.pop(),
        neurons=neurons,
        vocabulary=output.out_features,
        width=-(-output.out_features // count),
        cuts=cuts,
        sums=tuple(sums),
        weights=weights,
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
    text.intermediate_size = plan.neurons[1] - plan.neurons[0]
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
        cut, expected = plan.cuts.get(name.rpartition(".")[0]), list(parameter.shape)
        if cut is not None and (cut.side == "outputs" or len(expected) == 2):
            expected[0 if cut.side == "outputs" else 1] = cut.size
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
