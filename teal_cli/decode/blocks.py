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
from teal_cli.models.architectures import architecture_for
from teal_cli.models.programs import Norms, NormStep, ProductStep, Program, RouteStep, Step
from teal_cli.models.trained_sparse import zeroing_activation
from teal_cli.sparse import SparseLinear
from teal_cli.sparse.gate_first import GateFirstMLP
from teal_kernels.packing import Packed


@dataclass(frozen=True)
class Product:
    """The projections of one site, which are computed together."""

    name: str
    """Of the site."""
    layers: tuple[nn.Linear, ...]
    """Sparse layers, but for gate and up of an MLP that decodes gate first."""
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
    norms_of: str = "heads"
    """As the program has it."""
    grouped: bool = False
    """Whether each key head's queries, key and value lie side by side."""
    plus_one: bool = False
    """Whether those norms multiply by 1 + weight."""
    angles: str | None = None
    """Which of the rotary module's kinds of angles are its own; None where there is one kind."""
    cap: float = 0.0
    """Soft cap of scores; 0 for none."""
    rotates: bool = True
    """Whether queries and keys have the rotary embedding, where the model has one."""


BlockStep = Norm | Product | Attention | Route


def rms_norm(module: Any) -> Norm:
    """Weight and epsilon of an RMS norm, which transformers' modules name in two ways."""
    return Norm(module.weight, _eps(module))


def _eps(module: Any) -> float:
    return float(module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps)


def layer_norm(module: Any) -> Norm:
    """Of a layer norm, which may have neither weight nor bias."""
    weight = torch.ones(module.normalized_shape) if module.weight is None else module.weight
    return Norm(weight, _eps(module), getattr(module, "bias", None), centred=True)


def norm_of(module: Any, norms: Norms) -> Norm:
    """A module as the norm that a program says it is."""
    norm = layer_norm(module) if norms.startswith("layer") else rms_norm(module)
    return replace(norm, plus_one=norms.endswith("plus_one"))


@dataclass(frozen=True)
class Scales:
    """What a model multiplies by, beside its weights."""

    embedding: float = 1.0
    residual: float = 1.0
    """Of what is added to the residual stream."""
    logits: float = 1.0
    logits_cap: float = 0.0
    """Soft cap of the scaled logits; 0 for none."""


def scales_of(model: Any, program: Program) -> Scales:
    """The numbers that a program names.

    Raises:
        ArtefactError: the model does not have one of them.
    """
    config, embeddings = model.config.get_text_config(), model.get_input_embeddings()

    def number(key: str | None, default: float) -> float:
        if key is None:
            return default
        if not hasattr(config, key) and not hasattr(embeddings, key):
            raise ArtefactError(f"the program of this architecture names {key}, which the model does not have")
        value = getattr(config, key, getattr(embeddings, key, None))
        if isinstance(value, Tensor):
            if value.is_meta:  # a model of shapes alone, which computes nothing
                return default
            value = value.to(embeddings.weight.dtype)  # as transformers rounds it before it multiplies
        return default if value is None else float(value)

    return Scales(
        embedding=number(program.embedding_scale, 1.0),
        residual=number(program.residual_scale, 1.0),
        logits=number(program.logits_scale, 1.0) / number(program.logits_divisor, 1.0),
        logits_cap=number(program.logits_cap, 0.0),
    )


ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "fatrelu": "fatrelu",
    "drelu": "drelu",
}
"""Activations as configurations name them, and as both paths do."""


def unknown_activation(config: Any, program: Program) -> str | None:
    """An activation of a program that no path has; None where they have all."""
    names = [getattr(config, step.activation, None) for step in program.products if step.activation is not None]
    return next((str(name) for name in names if name not in ACTIVATIONS), None)


def activation_of(product: Product) -> tuple[str | None, float]:
    """What a gated or activated product does, and the threshold of that; None of others."""
    if product.activation is None:
        return None, 0.0
    zeroing = product.gate_first.activation if product.gate_first else None
    if zeroing is None and product.owner is not None:
        zeroing = zeroing_activation(product.owner)
    if zeroing is not None:
        return zeroing.kind, zeroing.threshold
    return ACTIVATIONS[product.activation], 0.0


def learned_positions(model: Any) -> tuple[Tensor, int] | None:
    """The embedding of positions, and the row of the first one, which in OPT is not 0; None where there is none."""
    path = program_of(model).positions
    if path is None:
        return None
    module = module_at(model, path)
    return module.weight.detach(), int(getattr(module, "offset", 0))


def growth_of(model: Any) -> tuple[float, int] | None:
    """By how much queries grow with their positions, and in steps of how many; None where they do not."""
    if not program_of(model).growing_queries:
        return None
    rope = model.config.get_text_config().rope_parameters
    return float(rope["llama_4_scaling_beta"]), int(rope["original_max_position_embeddings"])


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
    program = architecture_for(model).program
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
    architecture = architecture_for(model)
    blocks = [block for stack in architecture.blocks for block in module_at(model, stack).children()]
    return [[_resolved(step, model, block) for step in steps_of(program_of(model), block)] for block in blocks]


def steps_of(program: Program, block: nn.Module) -> list[Step]:
    """The steps of a program that one block takes: a module that is None is one that it does not have."""

    def has(path: str) -> bool:
        parent, _, name = path.rpartition(".")
        try:
            return block.get_submodule(parent)._modules.get(name) is not None
        except AttributeError:
            return False

    return program.steps_where(has)


def last_norm(model: Any) -> Norm:
    """The norm in front of the output layer."""
    program = program_of(model)
    return norm_of(module_at(model, program.norm), program.norms)


def _resolved(step: Step, model: Any, block: nn.Module) -> BlockStep:
    if isinstance(step, NormStep):
        if step.norm is None:
            return Norm(torch.empty(0), 0.0, identity=True, aside=step.aside)
        return replace(norm_of(module_at(block, step.norm), program_of(model).norms), aside=step.aside)
    if isinstance(step, ProductStep):
        return _product(step, model, block)
    if isinstance(step, RouteStep):
        return route_of(step, model.config.get_text_config(), module_at(block, step.route))
    attention = module_at(block, step.attention)
    norms = [None if name is None else rms_norm(module_at(attention, name)) for name in (step.q_norm, step.k_norm)]
    owner = {"layer": attention, "sliding": attention, "model": model.config.get_text_config()}.get(step.window or "")
    window, rotates = getattr(owner, "sliding_window", None), True
    if step.window == "sliding" and window is not None and not attention.is_sliding:
        window, rotates = None, False
    return Attention(
        scale=float(attention.scaling),
        window=int(window or 0),
        q_norm=norms[0].weight if norms[0] else None,
        k_norm=norms[1].weight if norms[1] else None,
        eps=next((norm.eps for norm in norms if norm), 0.0),
        norms_of=step.norms_of,
        grouped=step.grouped,
        plus_one=program_of(model).norms.endswith("plus_one"),
        angles=None if step.angles is None else getattr(attention, step.angles),
        cap=float((None if step.cap is None else getattr(attention, step.cap)) or 0.0),
        rotates=rotates and (step.rotates is None or bool(getattr(attention, step.rotates))),
    )


def _product(step: ProductStep, model: Any, block: nn.Module) -> Product:
    names = architecture_for(model).sites[step.product]
    return Product(
        name=step.product,
        layers=tuple(module_at(block, name) for name in names),
        epilogue=step.epilogue,
        activation=None if step.activation is None else getattr(model.config.get_text_config(), step.activation, None),
        owner=module_at(block, names[0].rpartition(".")[0]),
        norm=None if step.added_norm is None else norm_of(module_at(block, step.added_norm), program_of(model).norms),
        aside=step.aside,
        joined=step.joined,
        experts=step.experts,
        scaled_by=None if step.scaled_by is None else module_at(block, step.scaled_by),
    )


@torch.no_grad()
def rotary_tables(
    model: Any, positions: int, dtype: torch.dtype, last: int | None = None, kind: str | None = None
) -> tuple[Tensor, Tensor] | None:
    """cos and sin of every position, as the model's own module makes them: (positions, rotated size) each.

    None of a model without a rotary embedding. `last`: as in a pass whose last position is this one, on which long rope
    depends; of the positions behind it nothing is said. `kind`: of angles, where the module has several.
    """
    path = program_of(model).rotary
    if path is None:
        return None
    module, device = module_at(model, path), next(model.parameters()).device
    at = torch.arange(positions, device=device)
    if last is not None:
        at = torch.cat([at.clamp(max=last), at.new_tensor([last])])
    kinds = () if kind is None else (kind,)
    cos, sin = module(torch.empty(0, dtype=dtype, device=device), at[None], *kinds)
    return cos[0, :positions].contiguous(), sin[0, :positions].contiguous()


def long_rope_from(model: Any) -> int | None:
    """The position from which on a pass takes the other angles of long rope; None where there is no long rope."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    return int(rope["original_max_position_embeddings"]) if rope.get("rope_type") == "longrope" else None
