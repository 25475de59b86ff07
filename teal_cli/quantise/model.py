"""Quantising a model: in place, for measuring, and packed, for decoding."""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from teal_cli.errors import ArtefactError
from teal_cli.models.architectures import architecture_for, find_projections, output_projection
from teal_cli.models.layers import StackedLinear
from teal_cli.quantise.blockwise import quantise_blocks_
from teal_cli.quantise.dequantise import dequantise_
from teal_cli.quantise.rounding import quantise
from teal_cli.schemes import INT8, Scheme
from teal_cli.sparse.control import control_of
from teal_cli.sparse.experts import SparseExperts
from teal_cli.sparse.linear import SparseLinear
from teal_cli.sparse.merged import MergedProjections
from teal_cli.sparse.quantised import QuantisedLinear
from teal_cli.sparse.quantised_experts import QuantisedExperts
from teal_cli.sparse.replace import lay_out_
from teal_kernels.experts import stacked
from teal_kernels.packing import Packed


@torch.no_grad()
def quantise_(
    model: Any,
    scheme: Scheme,
    *,
    output_layer: bool = False,
    known: Mapping[str, Packed] = MappingProxyType({}),
    batches: tuple[Tensor, ...] = (),
    on_block: Callable[[int], None] = lambda blocks: None,
) -> dict[str, Packed]:
    """Give a dense model the weights that its quantised self has; the model stays an ordinary one.

    Calibration, sensitivities and evaluation then measure the quantised network.

    Args:
        model: a causal language model.
        scheme: of the projections.
        output_layer: quantise the output layer too, to 8 bits. Of tied embeddings it gets weights of its own.
        known: module path -> codes that came with the model; they are taken as they are.
        batches: (sequences, tokens) int64 each, for GPTQ; without any, and for 8 bits, the nearest codes are taken.
        on_block: told of each block that GPTQ has done.

    Returns:
        Module path -> the codes, scales and zero points that `pack_` puts in place.

    Raises:
        ArtefactError: what `quantised_layers` raises.
    """
    schemes = quantised_layers(model, scheme, output_layer=output_layer)
    packs = dict(known)
    dequantise_(model, packs)
    projections = find_projections(model)
    architecture = architecture_for(model)
    if batches and not known and scheme.bits == 4 and architecture.is_one_decoder:
        (path,) = architecture.blocks
        # Of experts the nearest codes are taken: of many, a text of some thousand tokens says little.
        layers = [p for p in projections if isinstance(model.get_submodule(p.name), nn.Linear)]
        packs = quantise_blocks_(model, path, layers, scheme, batches, on_block)
    nearest = {
        name: nearest_codes(model.get_submodule(name), of_this)
        for name, of_this in schemes.items()
        if name not in packs
    }
    dequantise_(model, nearest)
    return packs | nearest


def quantised_layers(model: Any, scheme: Scheme, *, output_layer: bool) -> dict[str, Scheme]:
    """Module path -> scheme of what is quantised.

    Args:
        model: a dense model, or its outline.
        scheme: of the projections.
        output_layer: the output layer too, to 8 bits.

    Raises:
        ArtefactError: a projection that is Conv1D; an output layer that is not linear.
    """
    schemes = {projection.name: scheme for projection in find_projections(model)}
    for name in schemes:
        kind = type(model.get_submodule(name))
        if not issubclass(kind, nn.Linear | StackedLinear):
            raise ArtefactError(f"{name} is a {kind.__name__}: only linear layers of their own can be quantised")
    if output_layer:
        schemes[output_projection(model, "--quantise-output").name] = INT8
    return schemes


def nearest_codes(layer: nn.Module, scheme: Scheme) -> Packed:
    """The nearest codes of a layer, or of each of its experts."""
    if isinstance(layer, StackedLinear):
        return stacked([quantise(weight, scheme) for weight in layer.weight])
    if isinstance(layer, SparseExperts):
        return stacked([quantise(layer.weight_of(nth), scheme) for nth in range(layer.copies)])
    return quantise(layer.weight, scheme)  # type: ignore[arg-type]


def schemes_of(names: Iterable[str], scheme: Scheme, output: str | None) -> dict[str, Scheme]:
    """Module path -> scheme: as asked for, and 8 bits for the output layer where it has a name."""
    schemes = dict.fromkeys(names, scheme)
    return schemes if output is None else schemes | {output: INT8}


def pack_(model: Any, packs: dict[str, Packed]) -> None:
    """Replace sparse layers by quantised ones, with the rule and the merged projections that they have.

    Args:
        model: with sparse layers for everything in `packs` but perhaps the output layer.
        packs: from `quantise_`.
    """
    if not packs:
        return
    for name, packed in packs.items():
        _replace(model, name, Scheme(packed.bits, 0 if packed.scales.shape[-2] == 1 else packed.group), packed)
    lay_out_(model)


def make_room_(model: Any, schemes: dict[str, Scheme]) -> None:
    """Replace sparse layers by quantised ones that a checkpoint will fill.

    Args:
        model: as for `pack_`, on any device, meta too.
        schemes: by module path.
    """
    for name, scheme in schemes.items():
        _replace(model, name, scheme, None)


def _replace(model: Any, name: str, scheme: Scheme, packed: Packed | None) -> None:
    layer = model.get_submodule(name)
    if not isinstance(layer, SparseLinear):  # the output layer, where plans do not name it
        layer = SparseLinear.from_linear(layer, name=name, control=control_of(model), merged=MergedProjections(name))
        layer.is_planned = False
    shared: dict[str, Any] = {"name": name, "control": layer.control, "merged": layer.merged, "part": layer.part}
    quantised: QuantisedExperts | QuantisedLinear
    if isinstance(layer, SparseExperts):
        quantised = QuantisedExperts(layer, scheme, **shared, packed=packed)
    else:
        quantised = QuantisedLinear(layer, scheme, **shared, packed=packed)
    quantised.is_output, quantised.is_planned = layer.is_output, layer.is_planned
    quantised.take_hooks_(layer)
    if not quantised.storage.is_meta:
        quantised.set_rule_(layer.rule)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, quantised)
