"""A quantised copy of a model that drafts for it: projections of fewer bits, all else shared."""

import copy
from itertools import chain
from typing import Any

import torch

from teal_cli.errors import UsageError
from teal_cli.models.architectures import find_projections
from teal_cli.quantise.model import nearest_codes, pack_, quantised_layers
from teal_cli.schemes import Scheme
from teal_cli.sparse import replace_projections_, sparse_layers
from teal_cli.sparse.gate_first import GateFirstMLP
from teal_cli.sparse.routed import RoutedMLP


def check_copy(model: Any, *, sparse: bool) -> None:
    """Refuse a copy that our own kernels could not decode: what leaves neurons out reads rows of weights, not codes.

    Args:
        model: that would be copied.
        sparse: whether the copy is to skip inputs; else it does not decode gate first.

    Raises:
        UsageError: it has MLPs that leave neurons out.
    """
    kinds = (RoutedMLP, GateFirstMLP) if sparse else RoutedMLP
    found = next((module.path for module in model.modules() if isinstance(module, kinds)), None)
    if found is not None:
        raise UsageError(
            f"{found} leaves neurons out, for which its weights cannot be quantised: draft by sparse or lookup (flag "
            "--speculate)"
        )


@torch.no_grad()
def quantised_copy(model: Any, scheme: Scheme) -> tuple[Any, int]:
    """A model whose projections are quantised to the nearest codes, its output layer to 8 bits.

    Rules of sparse layers come with it. Embeddings, norms and the like are the model's own tensors.

    Args:
        model: in eval mode, dense, sparse or quantised; it stays as it is.
        scheme: of the projections.

    Returns:
        The copy, and the bytes that it takes beside the model.

    Raises:
        ArtefactError: layers that cannot be quantised.
    """
    schemes = quantised_layers(model, scheme, output_layer=True)
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    made = copy.deepcopy(model, shared)
    if not sparse_layers(made):
        replace_projections_(made, [projection.name for projection in find_projections(made)])
    packs = {name: nearest_codes(made.get_submodule(name), of_this) for name, of_this in schemes.items()}
    pack_(made, packs)
    tensors = [tensor for packed in packs.values() for tensor in (packed.words, packed.scales, packed.zeros)]
    return made, sum(tensor.nbytes for tensor in tensors if tensor is not None)
