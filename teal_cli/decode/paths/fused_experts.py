"""Mixtures of experts on the fused path: what a router leaves for the products of the experts that it chose."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from teal_cli.decode.blocks import BlockStep, Product
from teal_cli.decode.routes import Route
from teal_cli.sparse.experts import SparseExperts
from teal_kernels.experts import Chosen, chosen_of, no_ids
from teal_kernels.packing import Packed
from teal_kernels.triton_router import MAX_EXPERTS, Router


@dataclass(frozen=True)
class Routing:
    """The choice of one block's router for the rows of a batch: the same memory in every block."""

    chosen: Chosen
    """Ids and weights, of no product yet."""
    every_tokens: Chosen
    """As if a router had chosen: the one expert that all rows have, and how much it counts."""

    @classmethod
    def empty(cls, rows: int, top_k: int, device: torch.device) -> "Routing":
        """Not chosen yet."""
        return cls(Chosen(*no_ids(rows, top_k, device), stride=0), Chosen(*no_ids(rows, 1, device), stride=0))

    def of(self, product: Product) -> Chosen | None:
        """As a product reads it; None for one that is the same for all rows."""
        if product.experts:
            return chosen_of(stack_of(product), self.chosen.ids, self.chosen.weights)
        return None if product.scaled_by is None else self.every_tokens


def stack_of(product: Product) -> Tensor | Packed:
    """The tables of all experts of a product, one behind the other."""
    (layer,) = product.layers
    if not isinstance(layer, SparseExperts):
        raise TypeError(f"{product.name} has no experts")
    return layer.table


def bias_of(product: Product) -> Tensor | None:
    """(experts, out) of a product of experts that has biases, else (out,); None where there is none."""
    if not product.experts:
        return product.bias
    (layer,) = product.sparse_layers
    bias = getattr(product.owner, f"{layer.name.rpartition('.')[2]}_bias", None)
    return None if bias is None else bias.detach()


def alternate(product: Product) -> bool:
    """Whether outputs of gate and of up alternate in the one layer of experts."""
    return product.joined and bool(getattr(product.owner, "interleaved", False))


def scale_of(block: list[BlockStep]) -> nn.Linear | None:
    """The layer that says how much an expert counts that all rows have, where a block has one."""
    return next((step.scaled_by for step in block if isinstance(step, Product) and step.scaled_by is not None), None)


def router_of(route: Route, scale: nn.Linear | None) -> Router:
    """A router as it is launched; with a scale its weights are copied, to lie beside those."""
    weight = route.weight.detach()
    return Router(
        weight.contiguous() if scale is None else torch.cat([weight, scale.weight.detach()]),
        None if route.bias is None else route.bias.detach(),
        scores=route.scores,
        normalised=route.normalised,
        jitter=route.jitter,
        aside=scale is not None,
    )


def cannot_route(block: list[BlockStep]) -> str | None:
    """Why the experts of a block cannot be launched; None where they can, or where there are none."""
    routes = [step for step in block if isinstance(step, Route)]
    if any(len(route.weight) > MAX_EXPERTS for route in routes):
        return f"more than {MAX_EXPERTS} experts"
    scale = scale_of(block)
    if scale is not None and (not routes or scale.bias is not None):
        return "an expert of all tokens that is scaled by a layer with a bias, or without a router"
    if routes and any(isinstance(step, Product) and step.norm is not None for step in block):
        return "a norm of what is added to the stream, in a block with experts"
    products = [step for step in block if isinstance(step, Product) and step.experts]
    for product in products:
        layer = product.layers[0]
        if not isinstance(layer, SparseExperts):
            continue  # of a dense model, whose experts the path lays out
        stack = layer.table
        if isinstance(stack, Tensor) and not stack[0].is_contiguous():
            return "experts that do not lie input-major"
    return None
