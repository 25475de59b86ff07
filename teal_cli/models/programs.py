"""Block programs: what one decoder block computes, as steps that the fused and the native decode path execute.

A program is data, part of an architecture's row (architectures.yaml). The hidden state of the residual stream is
called `hidden`. Each step reads what the step before it wrote:

    norm       norm of `hidden`, taken by the product that follows
    product    all projections of one site as one product, then its epilogue
    attention  of the new token over the KV cache, from a product whose parts are queries, keys and values
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Epilogue = Literal["plain", "gated", "activated", "residual"]
Pairs = Literal["halves", "halves_backwards", "neighbours", "neighbours_repeated"]
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
    added_norm: str | None = None
    """Of `residual`: module of the block that normalises what is added."""
    aside: bool = False
    """Whether it reads what the norm aside made, for attention and MLP in parallel, each behind a norm of its own."""
    parallel: bool = False
    """Whether it reads what the norm before the attention made, for attention and MLP in parallel."""
    summed: bool = False
    """Whether several devices would each hold some of the inputs, and sum their results before the epilogue."""

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


Step = NormStep | ProductStep | AttentionStep
_KINDS: dict[str, type[_Step]] = {"norm": NormStep, "product": ProductStep, "attention": AttentionStep}


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


class Program(BaseModel):
    """A decoder whose blocks all compute the same steps."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rotary: str | None = None
    """Path of the module in the model that makes the angles of the rotary embedding, or of their table: the sines of a
    position's pairs, then the cosines (GPT-J)."""
    positions: str | None = None
    """In its place: path of the embedding of positions, learned, which is added to a token's."""
    alibi: Alibi | None = None
    """In its place: ALiBi, a number for each query head times a key's position, added to scores. `rounded`: to the
    model's dtype (Bloom); `scaled`: to bfloat16, and multiplied as scores are (Falcon)."""
    requires: dict[str, bool | int] = {}
    """Keys of the configuration, and what they must be: with another value, a block computes something else."""
    fused: bool = True
    """Whether the fused path takes it: not where a GPU has not run it yet."""
    block: Annotated[tuple[Annotated[Step, BeforeValidator(_step)], ...], Field(min_length=1)]
    norm: str
    """Path of the norm in the model, in front of the output layer."""
    norms: Norms = "rms"
    """What all norms are: RMS norms, or layer norms, which take off the mean and may have a bias; `plus_one`: they
    multiply by 1 + weight."""
    pairs: Pairs = "halves"
    """What the rotary embedding turns together: the two halves, or neighbours; `halves_backwards`: by negative angles;
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
    def products(self) -> list[ProductStep]:
        """The products of a block."""
        return [step for step in self.block if isinstance(step, ProductStep)]

    def unmet(self, config: Any) -> str | None:
        """The first key of a configuration that is not what the program requires, and its value; None for none."""
        found = ((key, getattr(config, key, None), value) for key, value in self.requires.items())
        return next((f"{key} {str(own).lower()}" for key, own, value in found if own != value), None)

    @model_validator(mode="after")
    def _fits_together(self) -> "Program":
        if sum(kind is not None for kind in (self.rotary, self.positions, self.alibi)) != 1:
            raise ValueError("a program names rotary, positions or alibi, one of them")
        if self.residual_scale is not None and (self.rotary is None or self.embedding_norm is not None):
            raise ValueError("residual_scale belongs to programs with rotary and without embedding_norm")
        check_order(self.block)
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
            if (
                on_stream
                and not step.aside
                and not (step.parallel and isinstance(before, ProductStep) and before.added_norm is None)
            ):
                raise ValueError(f"product {step.product} must stand after a norm, attention or another product")
            if step.aside and not any(isinstance(other, NormStep) and other.aside for other in steps):
                raise ValueError(f"product {step.product} reads the norm aside, and there is none")
            if step.parallel and not on_stream:
                raise ValueError(f"product {step.product}: parallel belongs to a product behind a residual one")
            for key in ("input_norm", "added_norm"):
                if getattr(step, key) is not None and step.epilogue != "residual":
                    raise ValueError(f"product {step.product}: {key} belongs to epilogue residual")
            if (step.epilogue in ("gated", "activated")) != (step.activation is not None):
                raise ValueError(
                    f"product {step.product}: activation belongs to epilogues gated and activated, which need it"
                )
            if step.activation_module is not None and step.activation is None:
                raise ValueError(f"product {step.product}: activation_module stands beside activation")
            if step.joined and step.epilogue != "gated":
                raise ValueError(f"product {step.product}: joined belongs to epilogue gated")
        plain = isinstance(before, ProductStep) and before.epilogue == "plain"
        if isinstance(step, AttentionStep) and not plain:
            raise ValueError(f"attention {step.attention} must stand after the plain product of queries, keys, values")
        before = step
    if not (isinstance(before, ProductStep) and before.epilogue == "residual"):
        raise ValueError("the last step must be a product with epilogue residual")
    if sum(isinstance(step, AttentionStep) for step in steps) != 1:
        raise ValueError("there must be one attention step")
