"""Models that were trained to be sparse: their activations and model types, without code from a hub.

Importing it (`teal_cli.hf` does) teaches transformers the activation `fatrelu` and three model types
that come with code of their own on the hub, as what they are: Llama with FATReLU (`sparsellama`,
ProSparse, arXiv 2402.13516), Mistral with dReLU (`bamboo`, Turbo Sparse, arXiv 2406.05955), and Mixtral
with dReLU in its experts (`turbosparsemixtral`), whose predictors of zeros are not loaded: zeros are seen.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.activations import ACT2FN, ReLUSquaredActivation
from transformers.models.mistral.modeling_mistral import MistralMLP
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from teal_cli.errors import ArtefactError, nearest, shown
from teal_cli.models.layers import Experts
from teal_kernels.gate_first import GateActivation

_ACTIVATION_KEYS = ("hidden_act", "hidden_activation", "activation_function")
"""Under which configurations name the activation of their MLPs."""


class FatReLU(nn.Module):
    """x where x >= threshold, else 0. The threshold is set from the configuration once the model is there."""

    def __init__(self) -> None:
        super().__init__()
        self.threshold: float | None = None

    @property
    def activation(self) -> GateActivation:
        """What the kernels know it as.

        Raises:
            ArtefactError: no threshold was set.
        """
        if self.threshold is None:
            raise ArtefactError("the threshold of fatrelu is not set: load the model through teal_cli.models.loading")
        return GateActivation("fatrelu", self.threshold)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return self.activation.of_gate(x)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"threshold={self.threshold}"


class DoubleReLUMLP(MistralMLP):
    """An MLP whose gate and up products both pass the activation."""

    activates_up = True

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden) -> (..., hidden)"""
        hidden: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.act_fn(self.up_proj(x)))
        return hidden


class SparseLlamaConfig(LlamaConfig):
    """`sparsellama`: Llama's, with the threshold of its activation as `hidden_act_param`."""

    model_type = "sparsellama"


class SparseLlamaForCausalLM(LlamaForCausalLM):
    """Llama with FATReLU (or ReLU)."""

    config_class = SparseLlamaConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        set_activation_thresholds_(self)


class BambooConfig(MistralConfig):
    """`bamboo`: Mistral's."""

    model_type = "bamboo"


class BambooForCausalLM(MistralForCausalLM):
    """Mistral with dReLU: ReLU on the gate and on up."""

    config_class = BambooConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for block in self.model.layers:
            block.mlp.__class__ = DoubleReLUMLP  # the same modules and keys, another forward


class DoubleReLUExperts(MixtralExperts):
    """Experts whose gate and up products both pass the activation."""

    activates_up = True

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(batch * tokens, hidden), with the experts of each row and their weights -> (batch * tokens, hidden)"""
        hidden: Tensor = Experts(self)(hidden_states, top_k_index, top_k_weights)
        return hidden


class TurboSparseMixtralConfig(MixtralConfig):
    """`turbosparsemixtral`: Mixtral's."""

    model_type = "turbosparsemixtral"


class TurboSparseMixtralForCausalLM(MixtralForCausalLM):
    """Mixtral with dReLU experts."""

    config_class = TurboSparseMixtralConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        _names_of_mixtral(config.model_type)
        self._keys_to_ignore_on_load_unexpected = {r"\.predictor\."}
        for block in self.model.layers:
            block.mlp.experts.__class__ = DoubleReLUExperts  # the same parameters, another forward


@cache
def _names_of_mixtral(model_type: str) -> None:
    """Let the tensors of a model type be read and written under the names that Mixtral's have in files."""
    from transformers.conversion_mapping import (  # takes 0.1 s
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )

    register_checkpoint_conversion_mapping(model_type, get_checkpoint_conversion_mapping("mixtral"), overwrite=True)


ACT2FN["fatrelu"] = FatReLU
for _config, _model in (
    (SparseLlamaConfig, SparseLlamaForCausalLM),
    (BambooConfig, BambooForCausalLM),
    (TurboSparseMixtralConfig, TurboSparseMixtralForCausalLM),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)


def set_activation_thresholds_(model: Any) -> None:
    """Give each FATReLU of a model the threshold that the configuration names.

    Raises:
        ArtefactError: it names none, or something that is no number.
    """
    for module in model.modules():
        if isinstance(module, FatReLU):
            threshold = getattr(model.config, "hidden_act_param", None)
            if isinstance(threshold, bool) or not isinstance(threshold, int | float):
                raise ArtefactError(
                    f"hidden_act fatrelu needs its threshold as hidden_act_param in config.json, not {shown(threshold)}"
                )
            module.threshold = float(threshold)


def check_activation(config: dict[str, Any], where: object) -> None:
    """Refuse an activation that nobody knows, before transformers stumbles over it.

    Args:
        config: config.json, parsed.
        where: the folder, for the message.

    Raises:
        ArtefactError: an unknown name.
    """
    for key in _ACTIVATION_KEYS:
        name = config.get(key)
        if isinstance(name, str) and name not in ACT2FN:
            raise ArtefactError(
                f"{where}: unknown activation {shown(name)} ({key} in config.json){nearest(name, ACT2FN)}"
            )


def zeroing_activation(mlp: nn.Module) -> GateActivation | None:
    """The activation of an MLP (or of a block that has its MLP's layers itself), if it makes exact zeros."""
    for module in mlp.children():
        if isinstance(module, nn.ReLU):
            return GateActivation("drelu" if getattr(mlp, "activates_up", False) else "relu")
        if isinstance(module, ReLUSquaredActivation):
            return GateActivation("relu2")
        if isinstance(module, FatReLU):
            return module.activation
    return None


@torch.no_grad()
def computes_gated(mlp: nn.Module, gate: nn.Linear, up: nn.Linear, down: nn.Linear, activation: GateActivation) -> bool:
    """Whether an MLP is down(activation(gate) * up) and nothing else, by a random token: bit for bit."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, gate.in_features, generator=generator).to(gate.weight.device, gate.weight.dtype)
    return torch.equal(mlp(x), down(activation.hidden(gate(x), up(x))))
