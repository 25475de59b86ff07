"""Sparsity that a model was trained for: nothing is calibrated, and only exact zeros are skipped."""

from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.checkpoint.rules import Dense, Zeros
from teal_cli.errors import ArtefactError
from teal_cli.models.architectures import Projection, find_projections
from teal_cli.models.trained_sparse import computes_gated, zeroing_activation
from teal_cli.sparse.gate_first import GateFirstMLP
from teal_cli.sparse.replace import apply_plan_, replace_projections_
from teal_kernels.gate_first import GateActivation

INTRINSIC = "intrinsic"
"""What stands in place of an allocation."""


def make_intrinsic_(model: Any) -> SparsityPlan:
    """Let a dense model, loaded already, skip the zeros that its activation makes. The weights are not copied.

    A gated MLP decodes gate first; of an MLP without a gate, the inputs of its second layer that are
    zero are skipped. Everything else stays dense.

    Returns:
        The plan that the model now has: zeros before each `down`.

    Raises:
        ArtefactError: an unsupported model type, or an activation that makes no zeros.
    """
    projections = find_projections(model)
    downs = _intermediates(projections)
    if not downs:
        raise ArtefactError(f"--mode intrinsic knows no MLP of model type {model.config.model_type}: leave --mode out")
    inputs: dict[str, list[Projection]] = {}
    for projection in projections:
        inputs.setdefault(projection.site, []).append(projection)
    gated: dict[str, tuple[GateActivation, list[str]]] = {}
    for down in downs:
        path = down.name.rpartition(".")[0]
        activation = zeroing_activation(model.get_submodule(path))
        if activation is None:
            named = getattr(model.config, "hidden_act", None) or getattr(model.config, "activation_function", "none")
            raise ArtefactError(
                f"the activation of this model ({named}) makes no zeros to skip: --mode intrinsic is for models "
                "trained with relu, fatrelu, drelu or relu2; leave --mode out"
            )
        block = down.site.rpartition(".")[0]
        layers = [p.name for p in (*inputs.get(f"{block}.mlp_input", []), down)]
        if _is_gated(model, path, layers, activation):
            gated[path] = activation, layers
    skipped = {name for _, layers in gated.values() for name in layers[:2]}
    control = replace_projections_(model, [p.name for p in projections if p.name not in skipped])
    for path, (activation, layers) in gated.items():
        gate, up, down_name = (name.removeprefix(f"{path}.") for name in layers)
        parent, _, child = path.rpartition(".")
        mlp = GateFirstMLP(model.get_submodule(path), (gate, up, down_name), activation, path=path, control=control)
        setattr(model.get_submodule(parent), child, mlp)
    names = {down.name for down in downs}
    plan = SparsityPlan(
        allocation=INTRINSIC,
        target_sparsity=0.0,
        projections={p.name: Zeros() if p.name in names else Dense() for p in projections if p.name not in skipped},
    )
    apply_plan_(model, plan)
    return plan


def neuron_sparsity(model: Any, realised: Mapping[str, float]) -> float | None:
    """Share of MLP neurons that were zero, a mean over blocks; None where nothing was counted.

    Args:
        model: after `make_intrinsic_`.
        realised: projection name -> realised sparsity.
    """
    shares = [realised[down.name] for down in _intermediates(find_projections(model)) if down.name in realised]
    return sum(shares) / len(shares) if shares else None


def _intermediates(projections: list[Projection]) -> list[Projection]:
    """The projections that read the neurons."""
    return [p for p in projections if p.site.rpartition(".")[2] == "mlp_intermediate"]


def _is_gated(model: nn.Module, path: str, layers: list[str], activation: GateActivation) -> bool:
    """Whether these are gate, up and down of the MLP at `path`, and it computes with them what ours does."""
    if not path or len(layers) != 3 or any(name.rpartition(".")[0] != path for name in layers):
        return False
    gate, up, down = (cast(nn.Linear, model.get_submodule(name)) for name in layers)
    return computes_gated(model.get_submodule(path), gate, up, down, activation)
