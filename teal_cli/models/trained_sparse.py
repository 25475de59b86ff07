"""Model types that were trained to be sparse, without code from a hub.

Importing it (`teal_cli.hf` does) teaches transformers three model types that come with code of their own on the hub, as
what they are: Llama with FATReLU (`sparsellama`, ProSparse, arXiv 2402.13516), Mistral with dReLU (`bamboo`, Turbo
Sparse, arXiv 2406.05955), and Mixtral with dReLU in its experts (`turbosparsemixtral`), whose predictors of zeros are
not loaded: zeros are seen. Their activations are those of `teal_cli.models.activations`.
"""

from functools import cache
from typing import Any

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

from teal_cli.models.activations import activate_up_


class SparseLlamaConfig(LlamaConfig):
    """`sparsellama`: Llama's, with the threshold of its activation as `hidden_act_param`."""

    model_type = "sparsellama"


class SparseLlamaForCausalLM(LlamaForCausalLM):
    """Llama with FATReLU (or ReLU)."""

    config_class = SparseLlamaConfig


class BambooConfig(MistralConfig):
    """`bamboo`: Mistral's."""

    model_type = "bamboo"


class BambooForCausalLM(MistralForCausalLM):
    """Mistral with dReLU: ReLU on the gate and on up, which its configuration calls relu."""

    config_class = BambooConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for block in self.model.layers:
            activate_up_(block.mlp)


class TurboSparseMixtralConfig(MixtralConfig):
    """`turbosparsemixtral`: Mixtral's."""

    model_type = "turbosparsemixtral"


class TurboSparseMixtralForCausalLM(MixtralForCausalLM):
    """Mixtral with dReLU experts, which its configuration calls relu."""

    config_class = TurboSparseMixtralConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        _names_of_mixtral(config.model_type)
        self._keys_to_ignore_on_load_unexpected = {r"\.predictor\."}
        for block in self.model.layers:
            activate_up_(block.mlp.experts)


@cache
def _names_of_mixtral(model_type: str) -> None:
    """Let the tensors of a model type be read and written under the names that Mixtral's have in files."""
    from transformers.conversion_mapping import (  # takes 0.1 s
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )

    register_checkpoint_conversion_mapping(model_type, get_checkpoint_conversion_mapping("mixtral"), overwrite=True)


for _config, _model in (
    (SparseLlamaConfig, SparseLlamaForCausalLM),
    (BambooConfig, BambooForCausalLM),
    (TurboSparseMixtralConfig, TurboSparseMixtralForCausalLM),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)
