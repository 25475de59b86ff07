"""An architecture's block program and a model's blocks, made into steps that can be launched.

The row of the model's architecture says what a block computes (`teal_cli.models.programs`); here its names become
modules: norms become weights, sites become products, attention its scale and window. Both paths that execute programs,
the fused one and the native one, begin here.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from teal_cli.decode.routes import Route, route_of
from teal_cli.errors import ArtefactError
from teal_cli.models.architectures import architecture_for, blocks_of, program_for
from teal_cli.models.likeness import layers_of, steps_of
from teal_cli.models.programs import AttentionStep, Norms, NormStep, ProductStep, Program, RouteStep, Step
from teal_cli.sparse import SparseLinear
from teal_cli.sparse.gate_first import GateFirstMLP
from teal_cli.sparse.routed import RoutedMLP
from teal_kernels.packing import Packed


@dataclass(frozen=True)
class Product:
    """The projections of one site, which are computed together."""

    name: str
    """Of the site."""
    layers: tuple[nn.Linear, ...]
    """Sparse layers, but for gate and up of an MLP that decodes gate first, or is routed."""
    epilogue: str
    """What follows the product, as the program names it."""
    activation: str | None = None
    """Of the epilogue, as the configuration names it."""
    owner: nn.Module | None = None
    """The module whose layers they are."""
    norm: "Norm | None" = None
    """Of what is added to the residual stream."""
    aside: bool = False
    """Whether it reads the norm aside."""
    joined: bool = False
    """Whether the one layer holds gate and up, side by side."""
    stream_scale: Tensor | None = None
    """(1,) what the whole stream is multiplied by behind a residual product."""
    input_norm: "Norm | None" = None
    """Of what a residual product reads."""
    activation_module: nn.Module | None = None
    """That activates, where it has weights of its own."""
    experts: bool = False
    """Whether it is one of the chosen experts: the one layer is a `SparseExperts`, whose weight is
    (experts, out, in)."""
    scaled_by: nn.Linear | None = None
    """Of what the norm before made; the sigmoid of it multiplies what is added to the residual stream."""

    @property
    def sparse_layers(self) -> tuple[SparseLinear, ...]:
        """The layers, where all are sparse ones."""
        return cast(tuple[SparseLinear, ...], self.layers)

    @property
    def parts(self) -> tuple[int, ...]:
        """Outputs of each layer."""
        return tuple(layer.out_features for layer in self.layers)

    @property
    def gate_first(self) -> GateFirstMLP | None:
        """The MLP that lets the gate decide of which neurons `up` is computed, where it does so."""
        return self.owner if isinstance(self.owner, GateFirstMLP) and len(self.layers) == 2 else None

    @property
    def routed(self) -> RoutedMLP | None:
        """The MLP of which a router chooses neurons, where it is one and these are its gate and up."""
        return self.owner if isinstance(self.owner, RoutedMLP) and len(self.layers) == 2 else None

    @property
    def outputs(self) -> int:
        """Columns of what it writes."""
        return self.parts[0] // (2 if self.joined else 1) if self.epilogue == "gated" else sum(self.parts)

    @cached_property
    def table(self) -> Tensor | Packed:
        """(in, outputs of all layers): their weights, where they lie in one table."""
        return self.sparse_layers[0].merged.table

    @cached_property
    def bias(self) -> Tensor | None:
        """(outputs of all layers,); None where no layer has one."""
        return joined_bias(self.layers)


def joined_bias(layers: tuple[nn.Linear, ...]) -> Tensor | None:
    """(outputs of all layers,); None where no layer has one."""
    known = [layer.bias for layer in layers if layer.bias is not None]
    if not known:
        return None
    like = known[0].detach()
    return torch.cat(
        [like.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach() for layer in layers]
    )


@dataclass(frozen=True)
class Norm:
    """A norm of the residual stream, or of heads."""

    weight: Tensor
    eps: float
    bias: Tensor | None = None
    centred: bool = False
    """Whether the mean is taken off: a layer norm, and not an RMS norm."""
    plus_one: bool = False
    """Whether it multiplies by 1 + weight."""
    identity: bool = False
    """Whether it leaves the stream as it is; the weight is empty then."""
    aside: bool = False
    """Whether it is for products that say so."""


@dataclass(frozen=True)
class Attention:
    """The attention of one block."""

    scale: float
    window: int
    """Positions that are seen; 0 for all."""
    q_norm: Tensor | None
    k_norm: Tensor | None
    eps: float
    """Of those two norms."""
    q_norms: "tuple[Norm, ...]" = ()
    """Of query heads: one for all, or each head's own. `q_norm` is the weight of one."""
    k_norms: "tuple[Norm, ...]" = ()
    """The same for keys."""
    v_norms: "tuple[Norm, ...]" = ()
    """The same for values."""
    keys_as_values: bool = False
    """Whether values are the keys as they come from the product, which has none."""
    norms_of: str = "heads"
    """As the program has it."""
    grouped: bool = False
    """Whether each key head's queries, key and value lie side by side."""
    plus_one: bool = False
    """Whether those norms multiply by 1 + weight."""
    angles: str | float | None = None
    """Which of the rotary module's kinds of angles are its own; None where there is one kind."""
    cap: float = 0.0
    """Soft cap of scores; 0 for none."""
    rotates: bool = True
    """Whether queries and keys have the rotary embedding, where the model has one."""
    clip: float = 0.0
    """What queries, keys and values are clamped to, before all else; 0 for nothing."""
    sinks: Tensor | None = None
    """(heads,) logits that join the denominators of the softmax."""
    copies: int = 1
    """Of each key head, that the model's forward puts into a cache."""


BlockStep = Norm | Product | Attention | Route


def _eps(module: Any) -> float:
    """Which modules name in several ways; OLMo's has none, and takes the default of layer norms."""
    return float(next((getattr(module, key) for key in ("variance_epsilon", "eps") if hasattr(module, key)), 1e-5))


def norm_of(module: Any, norms: Norms, like: Tensor, size: int) -> Norm:
    """A module as the norm that a program says it is: RMS norm or layer norm, which may have neither weight nor bias.

    Args:
        module: of transformers.
        norms: as the program has it.
        like: what the weight of a module without one is on the device of, and in the dtype of.
        size: of that weight.
    """
    weight = getattr(module, "weight", None)
    return Norm(
        torch.ones(size, dtype=like.dtype, device=like.device) if weight is None else weight,
        _eps(module),
        getattr(module, "bias", None),
        centred=norms.startswith("layer"),
        plus_one=norms.endswith("plus_one"),
    )


def module_at(parent: nn.Module, path: str) -> Any:
    """A module that a program names.

    Raises:
        ArtefactError: there is none.
    """
    try:
        return parent.get_submodule(path)
    except AttributeError as error:
        raise ArtefactError(f"the program of this architecture names {path}, which the model does not have") from error


def program_of(model: Any) -> Program:
    """The program of a model's architecture.

    Raises:
        ValueError: it has none.
    """
    program = program_for(model)
    if program is None:
        raise ValueError(f"model type {model.config.model_type} has no block program")
    return program


def block_steps(model: Any) -> list[list[BlockStep]]:
    """The steps of every block, in order.

    Args:
        model: with sparse layers in all sites of its program.

    Raises:
        ArtefactError: the program names a module that the model does not have.
    """
    blocks = blocks_of(model).values()
    return [[_resolved(step, model, block) for step in steps_of(program_of(model), block)] for block in blocks]


def last_norm(model: Any) -> Norm:
    """The norm in front of the output layer."""
    return _norm_at(model, model, program_of(model).norm)


def embedding_norm(model: Any) -> Norm | None:
    """The norm that makes of embeddings the first state of the residual stream, where there is one."""
    path = program_of(model).embedding_norm
    return None if path is None else _norm_at(model, model, path)


def _norm_at(model: Any, parent: nn.Module, path: str, size: int | None = None) -> Norm:
    """`size`: of what it normalises; by default the residual stream's."""
    like = model.get_input_embeddings().weight
    return norm_of(module_at(parent, path), program_of(model).norms, like, size or like.shape[1])


def _resolved(step: Step, model: Any, block: nn.Module) -> BlockStep:
    if isinstance(step, NormStep):
        if step.norm is None:
            return Norm(torch.empty(0), 0.0, identity=True, aside=step.aside)
        return replace(_norm_at(model, block, step.norm), aside=step.aside)
    if isinstance(step, ProductStep):
        return _product(step, model, block)
    if isinstance(step, RouteStep):
        return route_of(step, model.config.get_text_config(), module_at(block, step.route))
    return _attention(step, model, block)


def _product(step: ProductStep, model: Any, block: nn.Module) -> Product:
    names = layers_of(architecture_for(model), step, block)
    layers = tuple(module_at(block, name) for name in names)
    return Product(
        step.product,
        layers,
        step.epilogue,
        activation=step.activation_in(model.config.get_text_config()),
        owner=module_at(block, names[0].rpartition(".")[0]),
        norm=None if step.added_norm is None else _norm_at(model, block, step.added_norm),
        aside=step.aside,
        joined=step.joined,
        input_norm=None if step.input_norm is None else _norm_at(model, block, step.input_norm, layers[0].in_features),
        activation_module=None if step.activation_module is None else module_at(block, step.activation_module),
        stream_scale=_named(step.stream_scale, block),
        experts=step.experts,
        scaled_by=None if step.scaled_by is None else module_at(block, step.scaled_by),
    )


def _attention(step: AttentionStep, model: Any, block: nn.Module) -> Attention:
    attention, config, program = module_at(block, step.attention), model.config.get_text_config(), program_of(model)
    q_norms, k_norms, v_norms = (
        _head_norms(attention, name, program, model) for name in (step.q_norm, step.k_norm, step.v_norm)
    )
    owner = {"layer": attention, "sliding": attention, "model": config}.get(step.window or "")
    window, rotates = _named("sliding_window", owner), True
    if step.window == "local" and attention.attention_type == "local":
        window = config.window_size
    if step.window == "sliding" and window is not None and not attention.is_sliding:
        window, rotates = None, False
    angles = _named(step.angles, attention)
    if angles is None and step.angles is not None:
        angles = getattr(config, step.angles)[attention.layer_idx]
        rotates = rotates and angles != 0
    return Attention(
        scale=_scale(attention) if step.scaled else 1.0,
        window=int(window or 0),
        q_norm=q_norms[0].weight if len(q_norms) == 1 else None,
        k_norm=k_norms[0].weight if len(k_norms) == 1 else None,
        eps=next((norm.eps for norm in (*q_norms, *k_norms)), 0.0),
        q_norms=q_norms,
        k_norms=k_norms,
        v_norms=v_norms,
        keys_as_values=bool(_named(step.keys_as_values, attention)),
        norms_of=step.norms_of,
        grouped=step.grouped,
        plus_one=program.norms.endswith("plus_one"),
        angles=angles,
        cap=float(_named(step.cap, attention) or 0.0),
        rotates=rotates and (step.rotates is None or bool(getattr(attention, step.rotates))),
        clip=float(_named(step.clip, attention, config) or 0.0),
        sinks=_named(step.sinks, attention),
        copies=attention.num_heads // attention.num_kv_heads if step.repeated else 1,
    )


def _named(key: str | None, *owners: Any) -> Any:
    """The first owner's attribute of this name; None where none has it."""
    return next((getattr(owner, key) for owner in owners if key is not None and hasattr(owner, key)), None)


def _scale(attention: Any) -> float:
    """Of scores, which modules name in several ways, GPT-J by its inverse."""
    scale = _named("scaling", attention) or _named("softmax_scale", attention) or _named("inv_norm_factor", attention)
    return float(scale) if scale is not None else 1.0 / float(attention.scale_attn)


def _head_norms(attention: nn.Module, name: str | None, program: Program, model: Any) -> tuple[Norm, ...]:
    """One norm of all heads, or each head's own (StableLM)."""
    if name is None:
        return ()
    found = module_at(attention, name)
    like = model.get_input_embeddings().weight
    of_heads = getattr(found, "norms", None) or [found]
    return tuple(norm_of(norm, program.norms, like, getattr(attention, "head_dim", 0)) for norm in of_heads)
