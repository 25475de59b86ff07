"""What config.json says, checked before transformers builds anything by it.

transformers believes most values: a rope_theta of 0 or an epsilon that is no number gives garbage without
a word, a billion layers fill the memory.
"""

import math
import re
from collections.abc import Iterator
from typing import Any

from teal_cli.errors import ArtefactError, shown

QUANT_METHOD = "teal"
"""The `quant_method` under which transformers knows TEAL checkpoints."""
MXFP4 = "mxfp4"
"""The method of experts that are dequantised (`teal_cli.quantise.mxfp4`)."""
PUBLISHED_METHODS = ("gptq", "awq")
"""Methods of quantisation whose codes are taken over (`teal_cli.quantise.published`)."""

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_SIZES = (
    *("num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer", "n_layers"),
    *("hidden_size", "d_model", "n_embd", "vocab_size", "intermediate_size", "d_ff", "d_kv", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "n_head", "num_heads"),
)
_MOST = ((re.compile(r"(^|_)(layers?|blocks)$"), 1024), (re.compile(r"(^|_)experts$"), 4096))
"""transformers builds each as Python objects. Published models have up to 126 layers and 2,048 experts."""
_LARGEST = 1 << 63
_EPSILON = re.compile(r"(^|_)(eps|epsilon)$")
_POSITIVE = re.compile(r"(rope|rotary).*(theta|base|freq)$|_softcapping$|^query_pre_attn_scalar$|^logits_scaling$")
_POSITIVE_OF_ROPE = re.compile(r"theta$|^factor$|^(short|long)_factor$|^(low|high)_freq_factor$")
_ROPE = ("rope_parameters", "rope_scaling")
_FREE = ("quantization_config", "id2label", "label2id", "auto_map", "task_specific_params")
_DEEPEST = 16


def check_config(config: dict[str, Any], where: str) -> None:
    """Refuse a model configuration that no model can have.

    Args:
        config: config.json, parsed.
        where: what it is, for the message: `config.json of FOLDER`.

    Raises:
        ArtefactError: no model type, an unknown dtype, sizes below 1, numbers that are none, or weights that are
            quantised in a way that is not read.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise ArtefactError(f"{where} names no model type (model_type is {shown(model_type)})")
    _check_quantisation(config, where)
    for key, value in _values(config, where):
        reason = _fault(key, value)
        if reason is not None:
            raise ArtefactError(f"{where} is damaged: {'.'.join(key)} is {shown(value)}, {reason}; download it again")


def named_dtype(config: dict[str, Any]) -> str | None:
    """The dtype that a configuration names for its weights, or for those of its text model; None where it names none.

    Args:
        config: config.json, parsed.
    """
    text = config.get("text_config")
    for place in (config, text if isinstance(text, dict) else {}):
        found = place.get("dtype") or place.get("torch_dtype")
        if isinstance(found, str):
            return found
    return None


def quantisation_of(config: dict[str, Any]) -> dict[str, Any]:
    """`quantization_config` of a model configuration; empty where it has none or something else."""
    found = config.get("quantization_config")
    return found if isinstance(found, dict) else {}


def method_of(config: dict[str, Any]) -> str | None:
    """How a model is quantised, in lower case; None of a dense one, or where its configuration does not say."""
    found = quantisation_of(config).get("quant_method")
    return found.lower() if isinstance(found, str) else None


def _check_quantisation(config: dict[str, Any], where: str) -> None:
    for place in ("quantization_config", "compression_config"):
        stored = config.get(place)
        if stored is None or stored == {}:
            continue
        if not isinstance(stored, dict):
            raise ArtefactError(f"{where} is damaged: {place} is {shown(stored)}, not a mapping")
        method = stored.get("quant_method")
        if stored.get("load_in_4bit") or stored.get("load_in_8bit"):
            method = "bitsandbytes"
        if not isinstance(method, str):
            raise ArtefactError(
                f"{where} says that its weights are quantised, but not how "
                f"({place} has no quant_method): download or export the model again"
            )
        is_read = method == QUANT_METHOD or method.lower() in (*PUBLISHED_METHODS, MXFP4)
        if place != "quantization_config" or not is_read:
            raise ArtefactError(
                f"{where} says that the weights are quantised by {shown(method)}, which teal does not read: "
                "take the model's unquantised weights, or those that GPTQ or AWQ quantised to 4 bits"
            )
    for key, value in config.items():
        if isinstance(value, dict) and value.get("quantization_config"):
            raise ArtefactError(
                f"{where} says that a part of the weights is quantised ({key[:100]}.quantization_config), which teal "
                "does not read: take the model's unquantised weights"
            )


_Path = tuple[str, ...]


def _values(config: dict[str, Any], where: str, path: _Path = ()) -> Iterator[tuple[_Path, Any]]:
    """Every value of a configuration that is no mapping, with its keys."""
    if len(path) > _DEEPEST:
        raise ArtefactError(f"{where} is damaged: {'.'.join(path)[:100]} is nested too deep")
    for key, value in config.items():
        if isinstance(value, dict) and key not in _FREE:
            yield from _values(value, where, (*path, key))
        elif key not in _FREE:
            yield (*path, key[:100]), value


def _fault(path: tuple[str, ...], value: Any) -> str | None:
    """Why no model can have such a value; None where one can."""
    key = path[-1]
    if key in ("dtype", "torch_dtype"):
        known = value is None or (isinstance(value, str) and value in _DTYPES)
        return None if known else f"not one of {', '.join(_DTYPES)}"
    numbers = [number for number in (value if isinstance(value, list) else [value]) if _is_number(number)]
    if any(number != number for number in numbers):
        return "which is not a number"
    if value is None:
        return None
    if key in _SIZES and not isinstance(value, list) and (type(value) is not int or value < 1):
        return "not a whole number from 1 on"
    most = next((most for pattern, most in _MOST if pattern.search(key)), _LARGEST)
    if any(isinstance(number, int) and abs(number) > most for number in numbers):
        return f"more than {most:,}"
    in_rope = any(part in _ROPE for part in path)
    if isinstance(value, list) and not in_rope:
        return None  # limits may be infinite (time_step_limit of Mamba 2)
    is_share = "dropout" in key or key in ("partial_rotary_factor", "rotary_pct")
    if is_share and not (numbers and 0 <= numbers[0] <= 1) and not isinstance(value, bool):
        return "not a share from 0 to 1"
    if key.endswith("experts_per_tok") and (type(value) is not int or value < 1):
        return "not a whole number from 1 on"
    if key == "decoder_start_token_id" and (type(value) is not int or value < 0):
        return "no token"
    if _EPSILON.search(key) and not (numbers and 0 <= numbers[0] < math.inf):
        return "not a finite number from 0 on"
    positive = _POSITIVE.search(key) or (in_rope and _POSITIVE_OF_ROPE.search(key))
    if positive and not (numbers and all(0 < number < math.inf for number in numbers)):
        return "not finite and above 0"
    if any(number in (math.inf, -math.inf) for number in numbers):
        return "which is not finite"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
