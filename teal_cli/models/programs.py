"""Block programs: what one decoder block computes, as steps that the fused and the native decode path execute.

A program is data, part of an architecture's row (architectures.yaml). The hidden state of the residual stream is
called `hidden`. Each step reads what the step before it wrote:

    norm       norm of `hidden`, taken by the product that follows
    product    all projections of one site as one product, then its epilogue
    attention  of the new token over the KV cache, from a product whose parts are queries, keys and values
    route      choice of experts and of their weights, from the norm before it; their products follow
    where      steps of the blocks that have a module, and other steps of the blocks that do not
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain, combinations
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Epilogue = Literal["plain", "gated", "activated", "residual"]
Pairs = Literal["halves", "halves_once", "halves_backwards", "neighbours", "neighbours_repeated"]
Norms = Literal["rms", "layer", "rms_plus_one", "layer_plus_one"]
Alibi = Literal["exact", "rounded", "scaled"]


class _Step(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class NormStep(_Step):
    """A norm of the residual stream."""

    norm: str | None
    """Path of the module inside the block; None: the products that follow read the stream as it is."""
    aside: bool = False
    """Whether it is for products that say so, behind the attention too; others read the norm before it."""


class ProductStep(_Step):
    """The projections of one site, and what follows their product."""

    product: str
    """The site."""
    epilogue: Epilogue = "plain"
    """`gated`: activation(first projection) * second one. `activated`: activation(the one projection). `residual`: the
    result is added to `hidden`."""
    activation: str | None = None
    """Key of the model's configuration that names the activation of `gated` and `activated`, or, where it has no such
    key, the name itself."""
    joined: bool = False
    """Of `gated`: whether one projection holds gate and up, side by side, in the place of two."""
    activation_module: str | None = None
    """Module of the block that activates, where it has weights of its own (xIELU)."""
    input_norm: str | None = None
    """Of `residual`: module of the block that normalises what the product reads."""
    stream_scale: str | None = None
    """Of `residual`: attribute of the block, what the whole stream is multiplied by afterwards (Gemma 4)."""
    added_norm: str | None = None
    """Of `residual`: module of the block that normalises what is added."""
    aside: bool = False
    """Whether it reads what the norm aside made, for attention and MLP in parallel, each behind a norm of its own."""
    parallel: bool = False
    """Whether it reads what the norm before the attention made, for attention and MLP in parallel."""
    summed: bool = False
    """Whether several devices would each hold some of the inputs, and sum their results before the epilogue."""
    experts: bool = False
    """Whether it is one of the chosen experts. A gated one reads what the route read; a residual one is weighted as the
    route says, and the sum over the experts is added to `hidden`."""
    scaled_by: str | None = None
    """Of `residual`: linear layer of the block with one output; what is added is multiplied by the sigmoid of that
    output, of what the norm before made."""

    @model_validator(mode="after")
    def _keys_fit_together(self) -> "ProductStep":
        where = f"product {self.product}"
        for key in ("input_norm", "added_norm", "stream_scale"):
            if getattr(self, key) is not None and self.epilogue != "residual":
                raise ValueError(f"{where}: {key} belongs to epilogue residual")
        if self.scaled_by is not None and (self.epilogue != "residual" or self.added_norm is not None):
            raise ValueError(f"{where}: scaled_by belongs to epilogue residual without added_norm")
        if (self.epilogue in ("gated", "activated")) != (self.activation is not None):
            raise ValueError(f"{where}: activation belongs to epilogues gated and activated, which need it")
        if self.activation_module is not None and self.activation is None:
            raise ValueError(f"{where}: activation_module stands beside activation")
        if self.joined and self.epilogue != "gated":
            raise ValueError(f"{where}: joined belongs to epilogue gated")
        known = {"product", "epilogue", "activation", "joined", "experts", "summed"}
        if self.experts and not self.model_fields_set <= known:
            raise ValueError(f"{where}: experts take no other key than epilogue, activation, joined and summed")
        return self

    def activation_in(self, config: Any) -> str | None:
        """The name of the activation of a model with this configuration; None for none."""
        return None if self.activation is None else getattr(config, self.activation, self.activation)


class AttentionStep(_Step):
    """Cache and attention of the new token, after its rotary embedding where the program has one."""

    attention: str
    """Path of the module inside the block; it knows its scale."""
    q_norm: str | None = None
    """Module inside it that normalises each query head; None for none."""
    k_norm: str | None = None
    """The same for keys."""
    v_norm: str | None = None
    """The same for values."""
    keys_as_values: str | None = None
    """Attribute of the module that says whether values are the keys, as they come from the product, which has none."""
    grouped: bool = False
    """Whether the product before has each key head's queries, key and value side by side."""
    scaled: bool = True
    """Whether scores are multiplied by a scale, which the module knows; GPT-Neo's are not."""
    repeated: bool = False
    """Whether the model's forward caches a key head once for each of its queries (Falcon)."""
    clip: str | None = None
    """What queries, keys and values are clamped to, as they come from the product: attribute of the module, or key of
    the configuration, which may be null."""
    sinks: str | None = None
    """Attribute of the module: of each query head a logit that joins the denominator of the softmax, and no more."""
    norms_of: Literal["heads", "rotated_heads", "all_heads"] = "heads"
    """What these normalise: each head, before or after the rotary embedding, or all heads at once, before it."""
    angles: str | None = None
    """Where the rotary module has several kinds: attribute of the module that names its own; or, where there is a list
    of modules with different bases, key of the configuration that has each layer's base, 0 for none (granite_swa)."""
    cap: str | None = None
    """Attribute of the module that is the soft cap of scores, where it is not None."""
    rotates: str | None = None
    """Attribute of the module that says whether this layer has the rotary embedding; None: all have it."""
    window: Literal["layer", "model", "sliding", "local"] | None = None
    """Who has `sliding_window`, the positions that are seen: the module, layer by layer, or the configuration;
    `sliding`: the module, where `is_sliding` is true, and where there are windows only these layers rotate; `local`:
    the configuration, as `window_size`, of modules whose `attention_type` is local."""


class RouteStep(_Step):
    """The choice of experts of each row, and of their weights, by the product of a router in float."""

    route: str
    """Path of the router inside the block: a module with a weight (experts, hidden), and maybe a bias."""
    top_k: str = "num_experts_per_tok"
    """How many are chosen: key of the configuration."""
    scores: Literal["softmax", "sparsemixer"] = "softmax"
    """`softmax`: the largest products are chosen; their weights are the softmax over all experts. `sparsemixer`: two,
    each by the largest product of those that are left; its weight is the softmax over those that are near to it, as
    Phi-3.5-MoE has it."""
    normalised: bool | str = False
    """Of `softmax`: whether the weights of the chosen ones sum to 1; or the key of the configuration that says so."""
    jitter: str | None = None
    """Of `sparsemixer`: key of the configuration, half of what counts as near, relatively."""


Step = NormStep | ProductStep | AttentionStep | RouteStep
_KINDS: dict[str, type[_Step]] = {
    "norm": NormStep,
    "product": ProductStep,
    "attention": AttentionStep,
    "route": RouteStep,
}


def _step(value: Any) -> Any:
    """A step by its kind, which is the key that all others stand beside.

    Raises:
        ValueError: no kind, or an unknown one.
    """
    if isinstance(value, _Step):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"a step is a mapping with one of the keys {', '.join(_KINDS)}")
    kinds = [kind for kind in _KINDS if kind in value]
    if len(kinds) != 1:
        names = ", ".join(map(str, value)) or "nothing"
        raise ValueError(f"a step has one of the keys {', '.join(_KINDS)}; this one has {names}")
    return _KINDS[kinds[0]].model_validate(value)


class WhereStep(_Step):
    """A choice that each block makes."""

    where: str
    """Path of a module that the block may have."""
    steps: tuple[Annotated[Step, BeforeValidator(_step)], ...]
    """Of the blocks that have it."""
    otherwise: tuple[Annotated[Step, BeforeValidator(_step)], ...] = ()
    """Of those that do not."""


def _step_or_choice(value: Any) -> Any:
    """The same, or a choice, which has no others inside."""
    return WhereStep.model_validate(value) if isinstance(value, Mapping) and "where" in value else _step(value)


class Program(BaseModel):
    """A decoder whose blocks all compute the same steps, but for choices."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rotary: str | None = None
    """Path of the module in the model that makes the angles of the rotary embedding, or of their table: the sines of a
    position's pairs, then the cosines (GPT-J)."""
    positions: str | None = None
    """In its place: path of the embedding of positions, learned, which is added to a token's."""
    alibi: Alibi | None = None
    """In its place: ALiBi, a number for each query head times a key's position, added to scores. `rounded`: to the
    model's dtype (Bloom); `scaled`: to bfloat16, and multiplied as scores are (Falcon)."""
    requires: dict[str, bool | int | None] = {}
    """Keys of the configuration, and what they must be: with another value, a block computes something else. A key that
    a configuration does not have is false, or zero."""
    fused: bool = True
    """Whether the fused path takes it."""
    block: Annotated[tuple[Annotated[Step | WhereStep, BeforeValidator(_step_or_choice)], ...], Field(min_length=1)]
    norm: str
    """Path of the norm in the model, in front of the output layer."""
    norms: Norms = "rms"
    """What all norms are: RMS norms, or layer norms, which take off the mean and may have a bias; `plus_one`: they
    multiply by 1 + weight."""
    pairs: Pairs = "halves"
    """What the rotary embedding turns together: the two halves, or neighbours; `halves_once`: the module has an angle
    for each pair, where others have it for both of its numbers; `halves_backwards`: by negative angles;
    `neighbours_repeated`: and the angles of a pair stand side by side too."""
    growing_queries: bool = False
    """Whether queries grow with their positions, as in Llama 4: by `llama_4_scaling_beta` of `rope_parameters`."""
    residual_scale: str | None = None
    """What residual products are multiplied by before they are added: key of the configuration."""
    logits_scale: str | None = None
    """What logits are multiplied by: key of the configuration."""
    logits_divisor: str | None = None
    """What logits are divided by: key of the configuration."""
    logits_cap: str | None = None
    """The soft cap of logits: key of the configuration, which may be null."""
    embedding_scale: str | None = None
    """What a token's embedding is multiplied by: key of the configuration, or attribute of the embeddings' module."""
    embedding_norm: str | None = None
    """Path of the norm in the model that makes of embeddings the first state of the residual stream."""

    @property
    def steps(self) -> list[Step]:
        """The steps of all blocks, whatever these choose."""
        return list(
            chain.from_iterable(
                (*step.steps, *step.otherwise) if isinstance(step, WhereStep) else (step,) for step in self.block
            )
        )

    @property
    def products(self) -> list[ProductStep]:
        """The products among them."""
        return [step for step in self.steps if isinstance(step, ProductStep)]

    def steps_where(self, has: Callable[[str], bool]) -> list[Step]:
        """The steps of one block.

        Args:
            has: whether it has a module of this path.
        """
        return list(
            chain.from_iterable(
                (step.steps if has(step.where) else step.otherwise) if isinstance(step, WhereStep) else (step,)
                for step in self.block
            )
        )

    def unmet(self, config: Any) -> str | None:
        """The first key of a configuration that is not what the program requires, and its value; None for none."""
        found = ((key, getattr(config, key, None), value) for key, value in self.requires.items())
        unlike = (entry for entry in found if entry[1] != entry[2] and (entry[1] is not None or entry[2]))
        return next((f"{key} {str(own).lower()}" for key, own, _ in unlike), None)

    @model_validator(mode="after")
    def _fits_together(self) -> "Program":
        if sum(kind is not None for kind in (self.rotary, self.positions, self.alibi)) != 1:
            raise ValueError("a program names rotary, positions or alibi, one of them")
        if self.residual_scale is not None and (self.rotary is None or self.embedding_norm is not None):
            raise ValueError("residual_scale belongs to programs with rotary and without embedding_norm")
        if self.residual_scale is not None and any(step.stream_scale for step in self.products):
            raise ValueError("residual_scale belongs to programs without stream_scale")
        choices = {step.where for step in self.block if isinstance(step, WhereStep)}
        for count in range(len(choices) + 1):
            for there in combinations(sorted(choices), count):
                check_order(self.steps_where(there.__contains__))
        return self


def check_order(steps: Sequence[Step]) -> None:
    """Refuse steps that cannot follow one another.

    Raises:
        ValueError: saying which step, and what must stand before it.
    """
    before: Step | None = None
    for step in steps:
        on_stream = before is None or (isinstance(before, ProductStep) and before.epilogue == "residual")
        if isinstance(step, NormStep) and not (isinstance(before, NormStep) if step.aside else on_stream):
            raise ValueError(f"norm {step.norm} must stand first or after a residual product")
        if isinstance(step, ProductStep):
            again = step.parallel and isinstance(before, ProductStep) and before.added_norm is None
            if on_stream and not step.aside and not again:
                raise ValueError(f"product {step.product} must stand after a norm, attention or another product")
            if step.aside and not any(isinstance(other, NormStep) and other.aside for other in steps):
                raise ValueError(f"product {step.product} reads the norm aside, and there is none")
            if step.parallel and not on_stream:
                raise ValueError(f"product {step.product}: parallel belongs to a product behind a residual one")
            _check_experts(step, before)
        plain = isinstance(before, ProductStep) and before.epilogue == "plain"
        if isinstance(step, AttentionStep) and not plain:
            raise ValueError(f"attention {step.attention} must stand after the plain product of queries, keys, values")
        if isinstance(step, RouteStep) and not isinstance(before, NormStep):
            raise ValueError(f"route {step.route} must stand after a norm")
        before = step
    if not (isinstance(before, ProductStep) and before.epilogue == "residual"):
        raise ValueError("the last step must be a product with epilogue residual")
    if sum(isinstance(step, AttentionStep) for step in steps) != 1:
        raise ValueError("there must be one attention step")


def _check_experts(step: ProductStep, before: Step | None) -> None:
    """Refuse products of experts that do not follow a route, and a route that nothing follows.

    Raises:
        ValueError: saying which step, and what must stand before it.
    """
    wanted = "gated" if isinstance(before, RouteStep) else None
    if isinstance(before, ProductStep) and before.experts and before.epilogue == "gated":
        wanted = "residual"
    if step.experts != (wanted is not None) or (step.experts and step.epilogue != wanted):
        raise ValueError(
            f"product {step.product}: behind a route, and nowhere else, stand a gated product of experts and a "
            "residual one"
        )
