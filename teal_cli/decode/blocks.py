"""An architecture's block program and a model's blocks, made into steps that can be launched.

The row of the model's architecture says what a block computes (`teal_cli.models.programs`); here its names become
modules: norms become weights, sites become products with their weights in one table, attention its scale and window.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from teal_cli.errors import ArtefactError
from teal_cli.models.architectures import Architecture, architecture_for
from teal_cli.models.programs import AttentionStep, NormStep, ProductStep, Program
from teal_cli.sparse import SparseLinear


class Product:
    """The projections of one site, which one launch computes.

    Args:
        name: of the site.
        layers: sparse layers whose weights lie in one table.
        epilogue: what follows the product, as `gemv` takes it.
    """

    def __init__(self, name: str, layers: Sequence[nn.Module], epilogue: str) -> None:
        self.name = name
        self.layers: list[SparseLinear] = list(layers)  # type: ignore[arg-type]
        self.epilogue = epilogue
        self.table = self.layers[0].merged.table
        self.parts = tuple(layer.out_features for layer in self.layers)
        self.bias: Tensor | None = None
        if any(layer.bias is not None for layer in self.layers):
            dtype = next(layer.bias.dtype for layer in self.layers if layer.bias is not None)
            biases = [
                torch.zeros(layer.out_features, dtype=dtype, device=self.table.device)
                if layer.bias is None
                else layer.bias.detach()
                for layer in self.layers
            ]
            self.bias = torch.cat(biases)

    @property
    def outputs(self) -> int:
        """Columns of what it writes."""
        return self.parts[0] if self.epilogue == "gated" else sum(self.parts)


@dataclass(frozen=True)
class RMSNorm:
    """A norm of the residual stream."""

    weight: Tensor
    eps: float


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


BlockStep = RMSNorm | Product | Attention


def rms_norm(module: Any) -> RMSNorm:
    """Weight and epsilon of an RMS norm, which transformers' modules name in two ways."""
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return RMSNorm(module.weight, eps)


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
        model: with sparse layers in all sites of its program, each site's weights in one table.

    Raises:
        ArtefactError: the program names a module that the model does not have.
    """
    architecture, program = architecture_for(model), program_of(model)
    blocks = [block for stack in architecture.blocks for block in module_at(model, stack).children()]
    return [[_resolved(step, architecture, model, block) for step in program.block] for block in blocks]


def _resolved(
    step: NormStep | ProductStep | AttentionStep, architecture: Architecture, model: Any, block: nn.Module
) -> BlockStep:
    if isinstance(step, NormStep):
        return rms_norm(module_at(block, step.norm))
    if isinstance(step, ProductStep):
        layers = [module_at(block, name) for name in architecture.sites[step.product]]
        return Product(step.product, layers, step.epilogue)
    attention = module_at(block, step.attention)
    norms = [None if name is None else rms_norm(module_at(attention, name)) for name in (step.q_norm, step.k_norm)]
    window = getattr({"layer": attention, "model": model.config}.get(step.window or ""), "sliding_window", None)
    return Attention(
        scale=float(attention.scaling),
        window=int(window or 0),
        q_norm=norms[0].weight if norms[0] else None,
        k_norm=norms[1].weight if norms[1] else None,
        eps=next((norm.eps for norm in norms if norm), 0.0),
    )
