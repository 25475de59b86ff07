"""Lets transformers load TEAL checkpoints: import this module, then `from_pretrained` as always.

    import teal_cli.hf
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("runs/smollm2-135m/fisher-0.50")

It also teaches transformers the models that are sparse by training (`teal_cli.models.trained_sparse`), and activations
that make zeros under any model type (`teal_cli.models.activations`).
Importing it imports transformers, which is why `import teal_cli` does not. Without this import
transformers warns of an unknown quantisation type and loads the dense model.
"""

import warnings
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from teal_cli.checkpoint.plan import SparsityPlan, quantization_config
from teal_cli.errors import ArtefactError
from teal_cli.models import trained_sparse  # noqa: F401  (transformers learns model types and activations)
from teal_cli.models.architectures import Architecture
from teal_cli.models.config_checks import QUANT_METHOD
from teal_cli.models.layers import is_conv1d, is_stacked, unstack_experts_
from teal_cli.models.likeness import adopt_likeness_
from teal_cli.quantise.model import make_room_, schemes_of
from teal_cli.schemes import Scheme
from teal_cli.sparse import apply_plan_, control_of, replace_projections_
from teal_cli.sparse.gated import decode_gate_first_, mlps_of_plan
from teal_cli.sparse.routing import RoutableMLP, check_routed, route_, routed_mlps


class TealConfig(QuantizationConfigMixin):
    """The `quantization_config` of a TEAL checkpoint: a validated `SparsityPlan`.

    Raises:
        ArtefactError: another format version, or damaged thresholds.
    """

    def __init__(self, **content: Any) -> None:
        content.pop("quant_method", None)
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # its enum is closed
        self.plan = SparsityPlan.from_dict(content)
        self.quantization: dict[str, Any] | None = content.get("quantization")
        """`projections`: how they are quantised, `output`: the name of a quantised output layer or None."""

        self.architecture = _architecture(content.get("architecture"))
        """The model's, where the table of architectures does not have it."""

    def to_dict(self) -> dict[str, Any]:
        """What `save_pretrained` writes into config.json."""
        row = None if self.architecture is None else self.architecture.row()
        return quantization_config(self.plan, self.quantization, row)

    def __repr__(self) -> str:
        return (
            f"TealConfig(allocation={self.plan.allocation!r}, target_sparsity={self.plan.target_sparsity}, "
            f"projections={len(self.plan.projections)})"
        )


def _architecture(row: Any) -> Architecture | None:
    try:
        return None if row is None else Architecture.model_validate(row)
    except ValueError as error:
        raise ArtefactError(
            f"the architecture of this TEAL checkpoint is damaged ({error}): export it again"
        ) from error


class TealQuantizer(HfQuantizer):
    """Replaces projections before the weights are read, sets thresholds and layout after.

    Projections that are not `nn.Linear` (Conv1D, stacked experts) are replaced after: their weights are read
    under the shapes and keys that transformers knows. Quantised experts are not: their codes have keys of their own.
    """

    requires_calibration = False
    requires_parameters_quantization = False
    quantization_config: TealConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        names = self.quantization_config.plan.projections
        self._dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        if self.quantization_config.architecture is not None:
            model.teal_architecture = self.quantization_config.architecture  # type: ignore[assignment]
        quantization = self.quantization_config.quantization
        if quantization is not None:  # codes of experts have keys of their own
            unstack_experts_(model)
        adopt_likeness_(model)
        modules = dict(model.named_modules())
        self._replaced = not any(is_stacked(module) or is_conv1d(module) for module in modules.values())
        self._routed: list[RoutableMLP] = []
        if not self._replaced:
            if self.quantization_config.plan.is_routed:
                raise ArtefactError("this TEAL checkpoint has routers beside experts or Conv1D layers, unknown here")
            return model
        control = replace_projections_(model, names)
        self._routed = route_(model, self.quantization_config.plan, control)
        if quantization is not None:
            try:
                of_blocks = [name for name in names if name != control.output]
                schemes = schemes_of(of_blocks, Scheme.parse(quantization["projections"]), quantization["output"])
            except (KeyError, ValueError, TypeError) as error:
                raise ArtefactError(f"this TEAL checkpoint is quantised in a way unknown here ({error})") from error
            make_room_(model, schemes)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        _cast_(model, self._dtypes)
        if not self._replaced:
            unstack_experts_(model)
            replace_projections_(model, self.quantization_config.plan.projections)
        # Non-persistent buffers hold uninitialised memory here: every threshold is set anew.
        plan = self.quantization_config.plan
        decode_gate_first_(model, mlps_of_plan(model, plan), control_of(model))
        _check_routers_were_read(model)
        check_routed(self._routed)
        apply_plan_(model, plan)
        _decode_with_cache_(model)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """The checkpoint can be saved again: the weights are the dense ones."""
        return True

    @property
    def is_trainable(self) -> bool:
        """No: dropped inputs get no gradient."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Yes; the default would switch off `generate`'s own compilation."""
        return True


def _cast_(model: Any, dtypes: dict[str, torch.dtype]) -> None:
    """Give parameters the dtype that was asked for, as transformers does without a quantiser.

    With one, 5.16 to 5.17 at least leave those whose keys it renames (experts, their routers) as the file has them.
    """
    kept = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    for name, parameter in model.named_parameters():
        dtype = dtypes.get(name, parameter.dtype)
        if parameter.is_floating_point() and parameter.dtype != dtype and not any(part in name for part in kept):
            parameter.data = parameter.data.to(dtype)


def _check_routers_were_read(model: nn.Module) -> None:
    """Of what it does not find in a file transformers warns, and goes on with what is in memory there.

    It marks what it has read.
    """
    for mlp in routed_mlps(model):
        marks = hasattr(mlp.layers[0].weight, "_is_hf_initialized")
        for name, parameter in mlp.router.named_parameters():
            if marks and not hasattr(parameter, "_is_hf_initialized"):
                raise ArtefactError(f"the weights lack {mlp.path}.router.{name}: the routers of this TEAL checkpoint")


def _decode_with_cache_(model: Any) -> None:
    """Let `generate` use a cache, which training with checkpointing leaves switched off in a configuration.

    Without one every step reads the whole text, which looks like a prompt and runs dense.
    """
    configs = [model.config, *(value for value in vars(model.config).values() if isinstance(value, PreTrainedConfig))]
    if model.can_generate():
        configs.append(model.generation_config)
        model.generate = partial(_generate, model)  # a partial: copies of the model generate with themselves
    for config in configs:
        if getattr(config, "use_cache", None) is False:
            config.use_cache = True


def _generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """transformers' `generate`, which says so where it cannot be sparse."""
    config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or model.generation_config
    use_cache = kwargs.get("use_cache")
    if (config.use_cache if use_cache is None else use_cache) is False and control_of(model).decodes_sparse:
        warnings.warn(
            "generate with use_cache=False runs dense: without a cache every step reads the whole text as a prompt, "
            "and prompts are dense; leave use_cache out",
            stacklevel=2,
        )
    return type(model).generate(model, *args, **kwargs)


if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:  # registering twice raises
    register_quantization_config(QUANT_METHOD)(TealConfig)
    register_quantizer(QUANT_METHOD)(TealQuantizer)
