"""vLLM's quantisation method `teal`: the thresholds of a TEAL checkpoint, and the layers that skip by them.

The weights are the dense ones, so vLLM loads and shards them as it always does. Which inputs a process holds does not
matter to a threshold: tensor parallelism needs nothing more.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.linear import WEIGHT_LOADER_V2_SUPPORTED, LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.utils.torch_utils import direct_register_custom_op

from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.checkpoint.rules import Rule
from teal_cli.errors import ArtefactError
from teal_cli.models.config_checks import QUANT_METHOD
from teal_cli.vllm_plugin import LOGGER
from teal_cli.vllm_plugin.product import note_rows, prepare, product, product_shape, skips_nothing_because
from teal_cli.vllm_plugin.projections import LayerRules, PlannedLayers
from teal_kernels import input_major
from teal_kernels.support import OLDEST_GPU

_logger = logging.getLogger(LOGGER)

if not hasattr(torch.ops.vllm, "teal_product"):
    direct_register_custom_op("teal_product", product, fake_impl=product_shape)
    direct_register_custom_op("teal_note_rows", note_rows, ["thresholds"], fake_impl=lambda *_: None)


class TealLinearMethod(UnquantizedLinearMethod):
    """A linear layer with the dense weights, which skips inputs if one of its projections has a rule for that.

    Args:
        config: of the model.
        rules: of its projections; None where nothing is skipped.
    """

    def __init__(self, config: "TealConfig", rules: list[Rule] | None) -> None:
        super().__init__()
        self.config, self.rules = config, rules
        self.of_layer: LayerRules | None = None
        self.notes_rows_for: TealHeadMethod | None = None

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        *rest: Any,
        **more: Any,
    ) -> None:
        """As of a dense layer, and thresholds."""
        super().create_weights(layer, input_size_per_partition, output_partition_sizes, *rest, **more)
        if self.rules is not None:
            self.of_layer = LayerRules.of(self.rules, output_partition_sizes)
            self.config.last_skipping = self
            _add_thresholds(layer, self.of_layer)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Lay the weights out for skipping. The model is whole now."""
        self.config.planned.check_complete()
        if self.of_layer is None:
            super().process_weights_after_loading(layer)
            return
        _lay_out_(layer, self.of_layer)
        if self.config.last_skipping is self:
            self.notes_rows_for = self.config.head
            if self.config.planned.misses_output_layer and get_pp_group().is_last_rank:
                _logger.warning("vLLM's model has no output layer of its own: all its weights are read")
            if (reason := skips_nothing_because(layer.weight.device, layer.weight.dtype)) is not None:
                _logger.warning("inputs are dropped and all weights are read, which is no faster: %s", reason)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., in) -> (..., out)."""
        if self.of_layer is None:
            y: Tensor = super().apply(layer, x, bias)
            return y
        if (head := self.notes_rows_for) is not None:
            torch.ops.vllm.teal_note_rows(x, head.layer.teal_thresholds, head.of_layer.bounds[0])
        return _multiply(layer, x, bias, self.of_layer)


class TealHeadMethod(UnquantizedEmbeddingMethod):
    """The output layer, where the plan has a rule for it.

    It is given the last row of each prompt, which is dense, and rows of steps, and vLLM does not say which. So the last
    layer in front of it that skips notes how many rows a pass has.

    Args:
        config: of the model.
        rule: its own.
    """

    layer: nn.Module
    of_layer: LayerRules

    def __init__(self, config: "TealConfig", rule: Rule) -> None:
        super().__init__()
        self.config, self.rule = config, rule

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        *rest: Any,
        **more: Any,
    ) -> None:
        """As of a dense layer, and its threshold."""
        super().create_weights(layer, input_size_per_partition, output_partition_sizes, *rest, **more)
        self.layer, self.of_layer = layer, LayerRules.of([self.rule], output_partition_sizes)
        self.config.head = self
        _add_thresholds(layer, self.of_layer)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Lay the weights out for skipping; embeddings that share them are read from there too."""
        _lay_out_(layer, self.of_layer)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., in) -> (..., vocabulary)."""
        return _multiply(layer, x, bias, self.of_layer)


def _add_thresholds(layer: Any, rules: LayerRules) -> None:
    layer.register_buffer("teal_thresholds", rules.thresholds(layer.weight.device), persistent=False)


def _lay_out_(layer: Any, rules: LayerRules) -> None:
    layer.weight.data = input_major(layer.weight.data)
    prepare(layer.weight.data, rules.parts, rules.sparsity)


def _multiply(layer: nn.Module, x: Tensor, bias: Tensor | None, rules: LayerRules) -> Tensor:
    y: Tensor = torch.ops.vllm.teal_product(x, layer.weight, bias, layer.teal_thresholds, rules.parts, rules.sparsity)
    return y


class TealConfig(QuantizationConfig):
    """The `quantization_config` of a TEAL checkpoint, as vLLM reads it.

    Args:
        plan: the rule of each projection.
    """

    def __init__(self, plan: SparsityPlan) -> None:
        super().__init__()
        self.planned = PlannedLayers(plan.projections)
        self.head: TealHeadMethod | None = None
        self.last_skipping: TealLinearMethod | None = None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "TealConfig":
        """Of what config.json says.

        Raises:
            ArtefactError: damaged thresholds, or something that vLLM cannot run.
        """
        plan = SparsityPlan.from_dict(config)
        if config.get("quantization") is not None:
            raise ArtefactError("this TEAL checkpoint is quantised, which vLLM cannot read: export without --quantise")
        if plan.is_routed:
            raise ArtefactError("this TEAL checkpoint has routers in front of its MLPs, which vLLM does not know")
        return cls(plan)

    def get_name(self) -> str:
        """As config.json has it."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Those of the kernels."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """That of the kernels."""
        major, minor = OLDEST_GPU
        return 10 * major + minor

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: thresholds are in config.json."""
        return []

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Call projections as vLLM's model does."""
        self.planned.rename(hf_to_vllm_mapper.apply_dict)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> TealLinearMethod | TealHeadMethod | None:
        """How a layer multiplies; None for those that are none of ours.

        Raises:
            ArtefactError: a layer whose projections cannot be told apart.
        """
        if isinstance(layer, LinearBase):
            return TealLinearMethod(self, self.planned.rules_of(prefix, self.packed_modules_mapping))
        if isinstance(layer, ParallelLMHead) and (rules := self.planned.rules_of(prefix, {})) is not None:
            return TealHeadMethod(self, rules[0])
        return None


WEIGHT_LOADER_V2_SUPPORTED.append(TealLinearMethod.__name__)
register_quantization_config(QUANT_METHOD)(TealConfig)
