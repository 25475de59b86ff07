"""Routers in front of a model's gated MLPs: putting them there, and setting them to leave out a share of neurons."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.checkpoint.rules import ROUTED, Dense, Routed, Rule
from teal_cli.errors import ArtefactError
from teal_cli.models.architectures import find_projections
from teal_cli.models.block_calls import hooked
from teal_cli.models.forward import run_text
from teal_cli.sparse.control import SparsityControl
from teal_cli.sparse.gated import intermediates
from teal_cli.sparse.routed import RoutedMLP, Router


@dataclass(frozen=True)
class RoutableMLP:
    """An MLP that has a gate, an up and a down layer and one activation among its children."""

    path: str
    """Of the module in the model."""
    names: tuple[str, str, str]
    """Of gate, up and down inside it."""
    activation: str
    """The same of the activation."""
    plain: nn.Module

    @torch.no_grad()
    def computes_gated(self) -> bool:
        """Whether it is down(activation(gate) * up) and nothing else, by random tokens: bit for bit."""
        gate, up, down = (cast(nn.Linear, getattr(self.plain, name)) for name in self.names)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, 2, gate.in_features, generator=generator).to(gate.weight.device, gate.weight.dtype)
        activation = getattr(self.plain, self.activation)
        ups = activation(up(x)) if getattr(self.plain, "activates_up", False) else up(x)
        return torch.equal(self.plain(x), down(activation(gate(x)) * ups))


def routable_mlps(model: Any) -> dict[str, RoutableMLP]:
    """MLPs that can be routed, by the path of their down layer.

    What they compute is not looked at: the model may be without weights (`RoutableMLP.computes_gated`).
    """
    projections = find_projections(model)
    inputs: dict[str, list[str]] = {}
    for projection in projections:
        inputs.setdefault(projection.site, []).append(projection.name)
    found = {}
    for down in intermediates(projections):
        path, block = down.name.rpartition(".")[0], down.site.rpartition(".")[0]
        layers = [*inputs.get(f"{block}.mlp_input", []), down.name]
        if len(layers) != 3 or not path or any(name.rpartition(".")[0] != path for name in layers):
            continue
        module = model.get_submodule(path)
        gate, up, last = (name.rpartition(".")[2] for name in layers)
        others = [name for name, child in module.named_children() if not list(child.parameters())]
        if len(others) == 1 and all(isinstance(getattr(module, name), nn.Linear) for name in (gate, up, last)):
            found[down.name] = RoutableMLP(path, (gate, up, last), others[0], module)
    return found


def routed_mlps(model: nn.Module) -> list[RoutedMLP]:
    """In the order of the model."""
    return [module for module in model.modules() if isinstance(module, RoutedMLP)]


def route_(model: Any, plan: SparsityPlan, control: SparsityControl) -> list[RoutableMLP]:
    """Put routed MLPs where a plan has the rule, on any device, meta too; the weights of routers are not set.

    Args:
        model: whose projections of the plan are sparse layers by now.
        plan: neither gate nor up of a routed MLP is in it.
        control: the model's.

    Returns:
        What was replaced. Its weights may be read later: then they are to be checked (`check_routed`).

    Raises:
        ArtefactError: the rule stands before something else than the down layer of a gated MLP.
    """
    rules = {name: rule for name, rule in plan.projections.items() if isinstance(rule, Routed)}
    known, replaced = routable_mlps(model) if rules else {}, []
    for name, rule in rules.items():
        mlp = known.get(name)
        if mlp is None:
            raise ArtefactError(f"a router is to choose what {name} reads, which is no down layer of a gated MLP")
        if both := [layer for layer in mlp.names[:2] if f"{mlp.path}.{layer}" in plan.projections]:
            raise ArtefactError(f"a router chooses the neurons of {mlp.path}, so {both[0]} of it can have no rule")
        parent, _, child = mlp.path.rpartition(".")
        try:
            ours = RoutedMLP(mlp.plain, mlp.names, mlp.activation, rule, path=mlp.path, control=control)
        except ValueError as error:
            raise ArtefactError(str(error)) from error
        setattr(model.get_submodule(parent), child, ours)
        control.of_routers += ours.router.parameters_read
        replaced.append(mlp)
    return replaced


def check_routed(replaced: list[RoutableMLP]) -> None:
    """Refuse MLPs that compute something else than routed ones do; with their weights.

    Raises:
        ArtefactError: see above.
    """
    for mlp in replaced:
        if not mlp.computes_gated():
            raise ArtefactError(f"{mlp.path} is more than down(activation(gate) * up): it cannot be routed")


def plan_of_routers(model: Any, rule: Routed, elsewhere: Mapping[str, Rule] | None = None) -> SparsityPlan:
    """The plan that routes all MLPs of a model.

    Args:
        model: plain.
        rule: of every MLP.
        elsewhere: rules of other projections; the rest stays dense.

    Raises:
        ArtefactError: no MLP that can be routed.
    """
    mlps = routable_mlps(model)
    if not mlps:
        raise ArtefactError(f"model type {model.config.model_type} has no gated MLP that can be routed")
    inside = {f"{mlp.path}.{name}" for mlp in mlps.values() for name in mlp.names[:2]}
    rules = elsewhere or {}
    projections: dict[str, Rule] = {
        p.name: rule if p.name in mlps else rules.get(p.name, Dense())
        for p in find_projections(model)
        if p.name not in inside
    }
    return SparsityPlan(ROUTED, rule.expected_sparsity, projections)


@contextmanager
def before_routing(model: nn.Module, action: Callable[[RoutedMLP, Tensor], None]) -> Iterator[None]:
    """Inside the block, `action` with each routed MLP and what it reads, (..., tokens, in), before it runs."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        action(cast(RoutedMLP, module), args[0])

    with hooked([mlp.register_forward_pre_hook(hook) for mlp in routed_mlps(model)]):
        yield


@torch.no_grad()
def random_weights_(router: Router, generator: torch.Generator) -> None:
    """Give a router weights that know nothing of the text, by which logits are about as large as what it reads."""
    for weight in (router.first, router.weight):
        if weight is not None:
            weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5)


@torch.no_grad()
def biases_for(router: Router, x: Tensor, share: float) -> Tensor:
    """(groups,) float32: the biases by which each group is left out at a share of these tokens.

    Each group has its own quantile: each is left out as often as the others. A bias lies between two tokens' logits, so
    that no token of these is chosen or left out by rounding.

    Args:
        router: with weights.
        x: (..., tokens, in), what it reads.
        share: below 1.
    """
    logits: Tensor = (router(x) - router.bias).float().flatten(0, -2)
    if share <= 0.0:
        return 1.0 - logits.amin(0)
    left_out = max(1, round(share * len(logits)))
    largest_left_out, _ = logits.kthvalue(left_out, dim=0)
    if left_out == len(logits):
        return -largest_left_out
    smallest_chosen, _ = logits.kthvalue(left_out + 1, dim=0)
    return -(largest_left_out + smallest_chosen) / 2


@torch.no_grad()
def set_random_routers_(model: Any, sequences: Tensor, share: float, *, seed: int = 0) -> None:
    """Give routers random weights, and the biases by which each MLP leaves out a share of its groups on a text.

    What trained routers are compared with, and what a speed is measured with.

    Args:
        model: with routed MLPs.
        sequences: (sequences, tokens) int64, run as one batch.
        share: of groups that are left out, below 1.
        seed: of the weights.
    """
    generator = torch.Generator().manual_seed(seed)

    def set_(mlp: RoutedMLP, x: Tensor) -> None:
        random_weights_(mlp.router, generator)
        mlp.router.bias.zero_()
        mlp.router.bias.copy_(biases_for(mlp.router, x, share))

    with before_routing(model, set_):
        run_text(model, sequences.to(model.device))


@torch.no_grad()
def shares_left_out(model: Any, sequences: Tensor) -> list[float]:
    """Share of groups that the router of each MLP leaves out on a text: a mean over tokens.

    Args:
        model: with routed MLPs.
        sequences: (sequences, tokens) int64, run as one batch.
    """
    shares: list[float] = []

    def count(mlp: RoutedMLP, x: Tensor) -> None:
        shares.append(float((mlp.router(x) <= 0).float().mean()))

    with before_routing(model, count):
        run_text(model, sequences.to(model.device))
    return shares
