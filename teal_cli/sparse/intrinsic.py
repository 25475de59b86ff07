"""Sparsity that a model was trained for: nothing is calibrated, and only exact zeros are skipped."""

from collections.abc import Mapping
from typing import Any

from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.checkpoint.rules import INTRINSIC, Dense, Rule, Zeros
from teal_cli.errors import ArtefactError
from teal_cli.models.activations import intermediates, zeroing_activation
from teal_cli.models.architectures import find_projections
from teal_cli.sparse.gated import decode_gate_first_, gated_mlps
from teal_cli.sparse.replace import apply_plan_, replace_projections_


def make_intrinsic_(model: Any, elsewhere: SparsityPlan | None = None) -> SparsityPlan:
    """Let a dense model, loaded already, skip the zeros that its activation makes. The weights are not copied.

    A gated MLP decodes gate first; of an MLP without a gate, and of experts, the inputs of the second layer that are
    zero are skipped.

    Args:
        model: plain, as `load_model` gives it.
        elsewhere: rules for the other projections (thresholds on attention, for one); without it they stay dense.
            What it says of layers of gated MLPs is left out.

    Returns:
        The plan that the model now has: zeros before each `down`. Exported, it loads back as it is.

    Raises:
        ArtefactError: an unsupported model type, or an activation that makes no zeros.
    """
    projections = find_projections(model)
    downs = intermediates(projections)
    if not downs:
        raise ArtefactError(f"--mode intrinsic knows no MLP of model type {model.config.model_type}: leave --mode out")
    for down in downs:
        if zeroing_activation(model.get_submodule(down.name.rpartition(".")[0])) is None:
            named = getattr(model.config, "hidden_act", None) or getattr(model.config, "activation_function", "none")
            raise ArtefactError(
                f"the activation of this model ({named}) makes no zeros to skip: --mode intrinsic is for models "
                "trained with relu, fatrelu, drelu or relu2; leave --mode out"
            )
    gated = gated_mlps(model, {down.name for down in downs})
    left_out = {name for mlp in gated for name in mlp.inputs}
    rules: dict[str, Rule] = {} if elsewhere is None else dict(elsewhere.projections)
    zeros = {down.name for down in downs}
    plan = SparsityPlan(
        allocation=INTRINSIC if elsewhere is None else f"{INTRINSIC} and {elsewhere.allocation}",
        target_sparsity=0.0 if elsewhere is None else elsewhere.target_sparsity,
        projections={
            p.name: Zeros() if p.name in zeros else rules.get(p.name, Dense())
            for p in projections
            if p.name not in left_out
        },
    )
    control = replace_projections_(model, plan.projections)
    decode_gate_first_(model, gated, control)
    apply_plan_(model, plan)
    return plan


def neuron_sparsity(model: Any, realised: Mapping[str, float]) -> float | None:
    """Share of neurons of MLPs or chosen experts that were zero, a mean over blocks; None where nothing was counted.

    Args:
        model: after `make_intrinsic_`.
        realised: projection name -> realised sparsity.
    """
    shares = [realised[down.name] for down in intermediates(find_projections(model)) if down.name in realised]
    return sum(shares) / len(shares) if shares else None
