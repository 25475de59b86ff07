"""Activations that make zeros as keys of any family's configuration: what is computed, loaded and refused."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES as ALL_FAMILIES
from conftest import VOCABULARY, build_family
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2FN

from teal_cli.errors import ArtefactError
from teal_cli.model_loading import load_model
from teal_cli.models.activations import gated_layers, neuron_modules, set_activation_, zeroing_activation
from teal_cli.models.layers import Experts, unstack_experts_

THRESHOLDS = [0.1, 0.4]
FAMILIES = {
    "llama": "hidden_act",
    "mistral": "hidden_act",
    "qwen2": "hidden_act",
    "qwen3": "hidden_act",
    "gemma": "hidden_act",
    "gemma2": "hidden_activation",
    "gemma3_text": "hidden_activation",
    "cohere2": "hidden_act",
    "phi3": "hidden_act",
    "mixtral": "hidden_act",
    "qwen3_moe": "hidden_act",
}
JOINED = {"phi3"}


def _hidden(name: str, gate: Tensor, up: Tensor, layer: int) -> Tensor:
    """What down reads, written out."""
    if name == "fatrelu":
        return torch.where(gate >= THRESHOLDS[layer], gate, 0.0) * up
    return gate.clamp(min=0) * up.clamp(min=0)


def _keys(family: str, name: str) -> dict[str, Any]:
    return {FAMILIES[family]: name, **({"hidden_act_param": THRESHOLDS} if name == "fatrelu" else {})}


def _made(family: str, **changes: object) -> Any:
    """By a configuration alone."""
    shape = ALL_FAMILIES[family] | changes
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(shape.pop("model_type"), **shape)).eval()
    unstack_experts_(model)
    return model


def _ids(length: int = 9) -> Tensor:
    return torch.randint(2, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("name", ["drelu", "fatrelu"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_mlp_is_the_formula(family: str, name: str) -> None:
    """In float64; the form of an MLP is found without being told."""
    model = _made(family, **_keys(family, name)).double()
    places = list(neuron_modules(model))
    assert len(places) == 2
    for layer, (_, module) in enumerate(places):
        if isinstance(module, Experts):
            both = torch.randn(5, module.gate_up_proj.out_features, dtype=torch.float64)  # type: ignore[call-overload]
            torch.testing.assert_close(module.neurons(both), _hidden(name, *both.chunk(2, dim=-1), layer))
            continue
        x = torch.randn(3, 64, dtype=torch.float64)
        if family in JOINED:
            gate, up = module.gate_up_proj(x).chunk(2, dim=-1)  # type: ignore[operator]
        else:
            gate, up = module.gate_proj(x), module.up_proj(x)  # type: ignore[operator]
        torch.testing.assert_close(module(x), module.down_proj(_hidden(name, gate, up, layer)))  # type: ignore[operator]


@torch.no_grad()
@pytest.mark.parametrize("name", ["drelu", "fatrelu"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_a_folder_loads_by_plain_from_pretrained(tmp_path: Path, family: str, name: str) -> None:
    """And without teal, which knows neither name, not at all."""
    model = build_family(family)
    set_activation_(model, name, THRESHOLDS if name == "fatrelu" else None)
    model.save_pretrained(tmp_path / "m")
    expected = model(_ids()).logits
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    torch.testing.assert_close(plain(_ids()).logits, expected)
    assert torch.equal(load_model(tmp_path / "m", device="cpu", dtype="auto")(_ids()).logits, expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(ACT2FN, name)
        with pytest.raises(KeyError, match=name):
            AutoModelForCausalLM.from_pretrained(tmp_path / "m")


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "opt", "cohere2", "gemma3", "qwen3_moe"])
def test_relu_takes_the_place_of_any_activation(tmp_path: Path, family: str) -> None:
    """Of MLPs without a gate too, and where the text model is a part of the configuration."""
    model = build_family(family)
    before = model(_ids()).logits
    set_activation_(model, "relu")
    expected = model(_ids()).logits
    assert (family == "opt") == torch.equal(expected, before)  # which has it
    model.save_pretrained(tmp_path / "m")
    loaded = load_model(tmp_path / "m", device="cpu", dtype="auto")
    assert torch.equal(loaded(_ids()).logits, expected)
    kinds = [zeroing_activation(module) for _, module in neuron_modules(loaded)]
    assert len(kinds) == 2
    assert all(kind is not None and kind.kind == "relu" for kind in kinds)


def test_copies_and_gradients() -> None:
    """dReLU passes no gradient to up where up is below zero, nor to the gate there."""
    model = copy.deepcopy(_made("llama", hidden_act="drelu"))
    mlp = model.model.layers[0].mlp
    x = torch.randn(1, 64)
    gate, up = mlp.gate_proj(x)[0], mlp.up_proj(x)[0]
    mlp(x).sum().backward()
    dead = (gate <= 0) | (up <= 0)
    for layer in (mlp.gate_proj, mlp.up_proj):
        assert (layer.weight.grad[dead] == 0).all()
        assert (layer.weight.grad[~dead] != 0).any(1).all()


@pytest.mark.parametrize("family", ["gpt2", "gpt_oss", "bamboo"])
def test_mlps_of_another_form_are_refused(family: str) -> None:
    """Without a gate, without a module that activates, and with another forward than the name says."""
    model = build_family(family)
    with pytest.raises(ArtefactError, match=r"drelu needs MLPs that are only gated|modules that activate|activates up"):
        set_activation_(model, "relu" if family == "bamboo" else "drelu")


def test_a_family_that_does_not_go_by_the_configuration_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    made = LlamaMLP.__init__

    def fixed(self: Any, config: Any) -> None:
        made(self, config)
        self.act_fn = nn.SiLU()

    monkeypatch.setattr(LlamaMLP, "__init__", fixed)
    model = build_family("llama")
    with pytest.raises(ArtefactError, match="do not take their activation from config.json: relu"):
        set_activation_(model, "relu")
    assert model.config.hidden_act == "silu"


def test_an_mlp_that_computes_more_is_not_gated(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_family("llama")
    mlp = model.model.layers[0].mlp
    assert gated_layers(mlp) == ("gate_proj", "up_proj", "down_proj")
    forward = type(mlp).forward
    monkeypatch.setattr(type(mlp), "forward", lambda self, x: 0.5 * forward(self, x))
    assert gated_layers(mlp) is None
    with pytest.raises(ArtefactError, match="LlamaMLP is not"):
        _made("llama", hidden_act="drelu")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([0.1], "has 1 thresholds of fatrelu, and there are 2 layers"),
        ([0.1, "a lot"], "not 'a lot'"),
        ([0.1, True], "not True"),
        (math.inf, "not inf"),
        (None, "not None"),
    ],
)
def test_thresholds_that_are_none(given: object, message: str) -> None:
    with pytest.raises(ArtefactError, match=message):
        _made("llama", hidden_act="fatrelu", hidden_act_param=given)


def test_outside_of_a_model_they_compute_nothing() -> None:
    for name, message in (("drelu", "it needs a gated MLP"), ("fatrelu", "the threshold of fatrelu is not set")):
        with pytest.raises(ArtefactError, match=message):
            ACT2FN[name](torch.zeros(2))
