"""How many bytes of weights a decoded token reads."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import cast

from torch import Tensor, nn

from teal_cli.models.architectures import Architecture, Projection, architecture_for, find_projections
from teal_cli.ranks.group import over_ranks
from teal_cli.sparse.linear import SparseLinear
from teal_cli.sparse.quantised import Codes, QuantisedLinear
from teal_cli.sparse.replace import sparse_layers
from teal_kernels.packing import Packed


def weight_bytes_per_token(
    model: nn.Module, realised: dict[str, float], packs: Mapping[str, Packed] = MappingProxyType({})
) -> int:
    """Bytes of weights that one decoded token reads.

    Every parameter of the decoder once, except the rows of dropped inputs, the experts that a token is
    not sent to, and embeddings that are not also the output layer (one row of each is read).

    Where several processes hold the model, the sum of what they read.

    Args:
        model: a transformers model that decodes.
        realised: projection name -> realised sparsity; missing ones are dense.
        packs: layers whose weights stand for quantised ones (`quantise.model.quantise_`).
    """
    architecture = architecture_for(model)
    # Of an encoder-decoder the decoder, of a model that also sees images the text model.
    several = architecture.kind == "causal" and not architecture.is_one_decoder
    stack = "" if several else architecture.blocks[-1].rpartition(".")[0]
    decoder = model.get_submodule(stack)
    output = model.get_output_embeddings()  # type: ignore[operator]
    parameters = {id(p): p for module in (decoder, output) for p in module.parameters()}
    total = float(sum(parameter.nbytes for parameter in parameters.values()))
    of_output = None if isinstance(output, QuantisedLinear) else output.weight
    for module in decoder.modules():
        if isinstance(module, nn.Embedding) and module.weight is not of_output:
            total -= module.weight.nbytes - module.weight[:1].nbytes
    # Of an encoder-decoder, layers of the encoder read nothing.
    inside = {id(module) for module in (*decoder.modules(), output)}
    beyond = {name: size for name, size in _beyond(model, packs).items() if id(model.get_submodule(name)) in inside}
    total += sum(beyond.values())
    read = {p.name: _share_read(architecture, p) for p in find_projections(model)}
    for name, share in read.items():
        owner, _, own = name.rpartition(".")
        bias = getattr(model.get_submodule(owner), f"{own}_bias", None)  # of experts, which lies beside their weights
        of_layer = [*model.get_submodule(name).parameters(), *([] if bias is None else [bias])]
        size = sum(p.nbytes for p in of_layer if id(p) in parameters)
        total -= (1.0 - share) * (size + beyond.get(name, 0))
    skipped = sum(
        _storage(model, name, packs).nbytes * share * read.get(name, 1.0)
        for name, share in realised.items()
        if id(model.get_submodule(name)) in inside
    )
    return over_ranks(model, round(total - skipped))


def _beyond(model: nn.Module, packs: Mapping[str, Packed]) -> dict[str, int]:
    """Bytes of quantised layers beyond those of their parameters; where weights stand for packs, fewer than none."""
    found = {name: packed.nbytes - _storage(model, name, {}).nbytes for name, packed in packs.items()}
    layers = sparse_layers(model).items()
    return found | {name: layer.packed.nbytes for name, layer in layers if isinstance(layer, Codes)}


def _share_read(architecture: Architecture, projection: Projection) -> float:
    """The share of a projection that a token reads, before inputs are dropped."""
    if projection.site.rpartition(".")[2] in architecture.once:
        return 0.0
    return projection.weights_read / projection.parameters


def _storage(model: nn.Module, name: str, packs: Mapping[str, Packed]) -> Tensor:
    """What the weights of a layer are held in."""
    if name in packs:
        return packs[name].words
    layer = model.get_submodule(name)
    return layer.storage if isinstance(layer, SparseLinear) else cast(nn.Linear, layer).weight
