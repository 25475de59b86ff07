"""Neurons of models in training: their signs, sizes and zeros, and the weight of their L1 loss."""

import math
from typing import Any

import pytest
import torch
from conftest import VOCABULARY, build_family
from torch import Tensor, nn

from teal_cli.adapt.multiplier import Steering, staged
from teal_cli.adapt.neurons import Neurons, flip_signs_, gate_quantiles, measure, shares_of_zeros
from teal_cli.models.activations import neuron_modules, set_activation_
from teal_cli.models.layers import Experts

PAPER = ((5 / 16.5, 0.0), (6 / 16.5, 0.005), (10 / 16.5, 0.05), (12 / 16.5, 0.05), (16 / 16.5, 0.2), (1.0, 0.2))


def _ids(rows: int = 2, length: int = 24) -> Tensor:
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))


def _with_mlp_biases(model: Any) -> Any:
    for block in model.model.layers:
        for layer in (block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj):
            layer.bias = nn.Parameter(torch.randn(layer.out_features) * 0.1)
    return model


def test_stages_are_those_of_the_paper() -> None:
    """At their ends and half-way; flat before, in the warm-up and between equal neighbours; never falling."""
    for end, weight in PAPER:
        assert staged(end, PAPER) == pytest.approx(weight, abs=1e-12)
    assert staged(5.5 / 16.5, PAPER) == 0.005
    assert staged(11 / 16.5, PAPER) == pytest.approx(0.05)
    assert staged(8 / 16.5, PAPER) == pytest.approx((0.005 + 0.05) / 2)
    at = (13 - 12) / (16 - 12)
    assert staged(13 / 16.5, PAPER) == pytest.approx(0.05 + 0.5 * (math.sin(-math.pi / 2 + math.pi * at) + 1) * 0.15)
    weights = [staged(step / 1000, PAPER) for step in range(1001)]
    assert weights == sorted(weights)
    assert staged(0.0, PAPER) == 0.0


@pytest.mark.parametrize("steps", [60, 1500])
@pytest.mark.parametrize("first", [0.001, 10.0])
def test_the_weight_is_steered_to_a_share_of_zeros(steps: int, first: float) -> None:
    """Of a model whose zeros follow the weight slowly, as trained ones do; a resumed run goes on the same."""
    steering = Steering(first, 0.9)
    found, path = 0.5, []
    for step in range(steps):
        if step == steps // 2:
            other = Steering(first, 0.9)
            other.start, other.total = steering.start, steering.total
            steering = other
        weight = steering.weight(step / steps, found, 1 / steps)
        goal = 1.0 - 0.5 / (1.0 + weight)
        found += (goal - found) * min(1.0, 40 / steps)
        path.append(found)
    assert path[round(0.04 * steps)] == 0.5  # nothing is asked at first
    assert path[-1] == pytest.approx(0.9, abs=0.01)
    assert max(path) < 0.96


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "llama with biases", "gemma2", "phi3", "mixtral"])
def test_flips_change_nothing_but_where_the_energy_lies(family: str) -> None:
    """Bit for bit; afterwards each neuron has as much energy above 0 as below, or more."""
    model = build_family(family.removesuffix(" with biases"))
    if family.endswith("biases"):
        _with_mlp_biases(model)
    ids = _ids()
    before, measured = model(ids).logits, measure(model, ids)
    share = flip_signs_(model, measured)
    assert 0.2 < share < 0.8
    assert torch.equal(model(ids).logits, before)
    after = measure(model, ids)
    assert torch.equal(after["scales"], measured["scales"])
    for layer in (0, 1):
        assert torch.equal(
            after[f"above.{layer}"], torch.maximum(measured[f"above.{layer}"], measured[f"below.{layer}"])
        )


@torch.no_grad()
def test_what_is_measured() -> None:
    """By hand, from the products of the first MLP."""
    model, ids = build_family("llama"), _ids()
    mlp, found = model.model.layers[0].mlp, []
    hook = mlp.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    measured = measure(model, ids)
    hook.remove()
    x = torch.cat(found).flatten(0, 1)
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    hidden = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(measured["scales"][0], hidden.abs().mean())
    live = (gate > 0).float()
    torch.testing.assert_close(measured["above.0"], (hidden.square() * live * (up > 0)).sum(0))
    torch.testing.assert_close(measured["below.0"], (hidden.square() * live * (up < 0)).sum(0))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("activation", ["relu", "drelu"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_sizes_and_zeros_of_a_pass(family: str, activation: str) -> None:
    """By hand; their gradient is that of the mean, and the model is left as it was."""
    model, ids = build_family(family), _ids()
    set_activation_(model, activation)
    neurons = Neurons(model, torch.tensor([2.0, 4.0]))
    seen: list[Tensor] = []
    modules = [module for _, module in neuron_modules(model)]
    for module in modules:
        if isinstance(module, Experts):
            watching = module.neurons

            def kept(both: Tensor, watching: Any = watching) -> Tensor:
                seen.append(both)
                hidden: Tensor = watching(both)
                return hidden

            module.neurons = kept  # type: ignore[method-assign]
        else:
            module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with neurons.watching():
        model(ids)
    products = []
    for module, x in zip(modules, seen, strict=True):
        products.append(
            x.chunk(2, dim=-1) if isinstance(module, Experts) else (module.gate_proj(x), module.up_proj(x))  # type: ignore[operator]
        )
    hidden = [gate.relu() * (up.relu() if activation == "drelu" else up) for gate, up in products]
    expected = sum(h.abs().mean() / scale for h, scale in zip(hidden, (2.0, 4.0), strict=True)) / 2
    size = neurons.size()
    torch.testing.assert_close(size, expected)
    weight = model.get_submodule(f"model.layers.1.mlp.{'experts.' if family == 'mixtral' else ''}down_proj").weight
    assert torch.autograd.grad(size, weight, allow_unused=True, retain_graph=True)[0] is None  # what comes after it
    name = "experts.gate_up_proj" if family == "mixtral" else "up_proj"
    first = model.get_submodule(f"model.layers.0.mlp.{name}").weight
    assert torch.autograd.grad(size, first)[0].abs().sum() > 0
    gates = sum(float((gate <= 0).float().mean()) for gate, _ in products) / 2
    zeros = sum(float((h == 0).float().mean()) for h in hidden) / 2
    assert neurons.zeros() == pytest.approx((gates, zeros), abs=1e-5)
    assert (zeros > gates + 0.1) == (activation == "drelu")
    neurons.let_go()
    assert not any(isinstance(vars(module).get("neurons"), type(neurons._of_experts)) for module in modules)


@torch.no_grad()
def test_thresholds_drop_the_wanted_share_of_live_gates() -> None:
    """Layer by layer, of what is live before: later layers see a little less."""
    model, ids = build_family("llama"), _ids(4, 48)
    set_activation_(model, "relu")
    before = shares_of_zeros(model, ids)
    thresholds = gate_quantiles(model, ids, 0.25)
    set_activation_(model, "fatrelu", thresholds)
    after = shares_of_zeros(model, ids)
    assert all(threshold > 0 for threshold in thresholds)
    for layer in (0, 1):
        live = [1 - shares["gate"][layer] for shares in (before, after)]
        assert live[1] / live[0] == pytest.approx(0.75, abs=0.001 if layer == 0 else 0.03)
