"""A quantised copy of a model that drafts for it: projections of fewer bits, all else shared."""

import copy
from itertools import chain
from typing import Any

import torch

from teal_cli.models.architectures import find_projections
from teal_cli.quantise.model import nearest_codes, pack_, quantised_layers
from teal_cli.schemes import Scheme
from teal_cli.sparse import replace_projections_, sparse_layers


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
