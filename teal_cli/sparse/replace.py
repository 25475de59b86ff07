"""Putting sparse layers in the place of a model's projections, and thresholds into them."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.errors import ArtefactError
from teal_cli.models.architectures import Architecture, Projection, architecture_for, find_projections
from teal_cli.models.layers import StackedLinear, is_conv1d
from teal_cli.models.shards import shards_of
from teal_cli.ranks.group import ranks_of
from teal_cli.sparse.control import SparsityControl
from teal_cli.sparse.conv1d import SparseConv1D
from teal_cli.sparse.experts import ExpertTables, SparseExperts
from teal_cli.sparse.gated import decode_gate_first_, mlps_of_plan
from teal_cli.sparse.linear import SparseLinear
from teal_cli.sparse.merged import MergedProjections
from teal_cli.sparse.routing import check_routed, route_


def sparse_layers(model: nn.Module) -> dict[str, SparseLinear]:
    """Module path -> sparse layer."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}


def replace_projections_(model: nn.Module, names: Iterable[str]) -> SparsityControl:
    """Replace linear layers by sparse ones that hold the same parameters (on any device, meta too).

    Raises:
        ArtefactError: a name that is no linear layer of this model.
    """
    architecture = architecture_for(model)
    control = SparsityControl(encodes=architecture.kind == "encoder", ranks=ranks_of(model))
    if (shards := shards_of(model)) is not None:
        control.whole = shards.weights
    found = {projection.name: projection for projection in find_projections(model)}
    output = model.get_output_embeddings() if architecture.kind == "causal" else None  # type: ignore[operator]
    merged: dict[str, MergedProjections] = {}
    for name in names:
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            linear = None
        parent, _, child = name.rpartition(".")
        layer = None if linear is None else _sparse(linear, name, control, merged, found.get(name))
        if layer is None:
            raise ArtefactError(f"the model has no linear layer {name}: these thresholds belong to another model")
        if linear is output:
            layer.is_output, control.output = True, name
            _stay_with_inputs(layer, linear)
        setattr(model.get_submodule(parent), child, layer)
    _begin_and_end_passes(model, architecture, control)
    return control


def _stay_with_inputs(layer: nn.Module, before: Any) -> None:
    """Let an output layer be given its input where its weights are, if that of a model on several devices was.

    Tied to the embedding it lies with the first blocks. accelerate's hook is around the forward of the layer replaced.
    """
    device = getattr(getattr(before, "_hf_hook", None), "execution_device", None)
    if device is not None:

        def follow(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0].to(device), *args[1:])

        layer.register_forward_pre_hook(follow)


def _begin_and_end_passes(model: nn.Module, architecture: Architecture, control: SparsityControl) -> None:
    """Let calls of the model, and of its stacks of blocks alone, give the layers their context.

    The stacks of an encoder-decoder read texts of their own, which its whole says nothing of.
    """
    stacks = [model.get_submodule(path.rpartition(".")[0]) for path in architecture.blocks]
    for module in stacks if architecture.kind == "seq2seq" else dict.fromkeys([model, *stacks]):
        module.register_forward_pre_hook(control.begin_pass, with_kwargs=True)
        module.register_forward_hook(control.end_pass, always_call=True)


def _sparse(
    linear: nn.Module,
    name: str,
    control: SparsityControl,
    merged: dict[str, MergedProjections],
    projection: Projection | None,
) -> SparseLinear | None:
    """The sparse layer for a linear one, merged with the others of its site; None for a module that is none."""
    site = name if projection is None else projection.site
    if isinstance(linear, StackedLinear):
        chosen = None if projection is None else projection.chosen
        tables = merged.setdefault(site, ExpertTables(site))
        return SparseExperts(linear, name=name, control=control, merged=tables, chosen=chosen)
    with_others = merged.setdefault(site, MergedProjections(site))
    shared: dict[str, Any] = {"name": name, "control": control, "merged": with_others}
    if isinstance(linear, nn.Linear):
        return SparseLinear.from_linear(linear, **shared)
    return SparseConv1D.from_conv1d(linear, **shared) if is_conv1d(linear) else None


def lay_out_(model: nn.Module) -> None:
    """Lay every projection's weight out for skipping inputs, as its threshold asks.

    `apply_plan_` does it; needed again after a move to another device: until then decoding is right
    but slow.
    """
    for merged in {id(layer.merged): layer.merged for layer in sparse_layers(model).values()}.values():
        merged.lay_out_()


def set_thresholds_(model: nn.Module, plan: SparsityPlan) -> None:
    """Set the thresholds of a model whose projections were replaced, and leave its weights where they lie.

    Enough for passes over many tokens; for decoding, `apply_plan_`.

    Raises:
        ArtefactError: the plan's projections are not the model's.
    """
    layers = {name: layer for name, layer in sparse_layers(model).items() if layer.is_planned}
    if set(layers) != set(plan.projections):
        odd = sorted(set(layers) ^ set(plan.projections))[0]
        raise ArtefactError(f"the sparse layers of the model and of the plan differ, at {odd}")
    for name, layer in layers.items():
        layer.control.change_plan()
        layer.set_rule_(plan.projections[name])


def apply_plan_(model: nn.Module, plan: SparsityPlan) -> None:
    """Set the thresholds of a model whose projections were replaced, and lay its weights out.

    Raises:
        ArtefactError: the plan's projections are not the model's.
    """
    set_thresholds_(model, plan)
    lay_out_(model)


def sparsify_(model: nn.Module, plan: SparsityPlan) -> SparsityControl:
    """Make a dense model, loaded already, decode sparsely by a plan. The weights are not copied.

    A gated MLP with zeros before its down decodes gate first, where the plan names neither its gate nor its up. Weights
    of routers are not set.

    Raises:
        ArtefactError: the plan's projections are not the model's, or an MLP that cannot be routed is to be.
    """
    gated = mlps_of_plan(model, plan)
    control = replace_projections_(model, plan.projections)
    decode_gate_first_(model, gated, control)
    check_routed(route_(model, plan, control))
    apply_plan_(model, plan)
    return control
