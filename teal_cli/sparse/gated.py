"""Finding gated MLPs whose activation makes zeros, and letting them decode gate first."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.checkpoint.rules import Zeros
from teal_cli.models.activations import computes_gated, intermediates, zeroing_activation
from teal_cli.models.architectures import find_projections
from teal_cli.sparse.control import SparsityControl
from teal_cli.sparse.gate_first import GateFirstMLP
from teal_kernels.gate_first import GateActivation


@dataclass(frozen=True)
class GatedMLP:
    """An MLP that is down(activation(gate(x)) * up(x))."""

    path: str
    """Of the module in the model."""
    activation: GateActivation
    inputs: tuple[str, str]
    """Module paths of gate and up."""
    down: str


def gated_mlps(model: Any, downs: Collection[str]) -> list[GatedMLP]:
    """The MLPs around these layers that are gated, by an activation that makes zeros, and compute what ours do.

    Args:
        model: with its weights.
        downs: module paths of layers that read neurons.
    """
    projections = find_projections(model)
    inputs: dict[str, list[str]] = {}
    for projection in projections:
        inputs.setdefault(projection.site, []).append(projection.name)
    found = []
    for down in intermediates(projections):
        path, block = down.name.rpartition(".")[0], down.site.rpartition(".")[0]
        before = inputs.get(f"{block}.mlp_input", [])
        if down.name not in downs or len(before) != 2 or not path:
            continue
        if any(name.rpartition(".")[0] != path for name in before):
            continue
        mlp = model.get_submodule(path)
        activation = zeroing_activation(mlp)
        gate, up, last = (cast(nn.Linear, model.get_submodule(name)) for name in (*before, down.name))
        if activation is not None and computes_gated(mlp, gate, up, last, activation):
            found.append(GatedMLP(path, activation, (before[0], before[1]), down.name))
    return found


def mlps_of_plan(model: Any, plan: SparsityPlan) -> list[GatedMLP]:
    """The gated MLPs that a plan lets decode gate first: it has zeros before down, and names neither gate nor up."""
    if not plan.has_zeros:
        return []
    zeros = {name for name, rule in plan.projections.items() if isinstance(rule, Zeros)}
    return [mlp for mlp in gated_mlps(model, zeros) if not plan.projections.keys() & set(mlp.inputs)]


def decode_gate_first_(model: nn.Module, mlps: Iterable[GatedMLP], control: SparsityControl) -> None:
    """Put modules that decode gate first in the place of these MLPs; their layers stay."""
    for mlp in mlps:
        parent, _, child = mlp.path.rpartition(".")
        gate, up, down = (name.removeprefix(f"{mlp.path}.") for name in (*mlp.inputs, mlp.down))
        module = model.get_submodule(mlp.path)
        ours = GateFirstMLP(module, (gate, up, down), mlp.activation, path=mlp.path, control=control)
        setattr(model.get_submodule(parent), child, ours)
