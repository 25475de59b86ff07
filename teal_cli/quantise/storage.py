"""Quantised weights on disk: dense safetensors files in, one file with codes, scales and zero points out."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from teal_cli.atomic import atomic_path
from teal_cli.errors import ArtefactError, reading
from teal_cli.models.layers import StackedLinear
from teal_cli.models.weights import tensor_header
from teal_cli.schemes import Scheme
from teal_kernels.packing import Packed

_OUTPUT = "lm_head"
_CODES, _SCALES, _ZEROS = "qweight", "scales", "zeros"


def model_keys(stored: Iterable[str], model: Any) -> dict[str, str]:
    """What a model calls the tensors of its weight files: as `from_pretrained` finds them.

    Files that were saved from the base model lack the prefix of the whole one (`model.`), and the base model's files
    may have it (`bert.`): it is put before or taken away where only that gives a name that the model has.

    Args:
        stored: keys of the weight files.
        model: the model, or its outline.

    Returns:
        Each stored key with the model's name for it, or with itself where the model has none.
    """
    names, prefix = set(model.state_dict()), f"{model.base_model_prefix}."
    found = {}
    for key in stored:
        candidates = (key, key.removeprefix(prefix), prefix + key)
        found[key] = next((name for name in candidates if name in names), key)
    return found


def require_weights(shards: list[Path], layers: Iterable[str], model: Any) -> None:
    """Refuse a model whose weight files do not hold the weights of these layers.

    Args:
        shards: the dense weight files.
        layers: module paths.
        model: the model, or its outline.

    Raises:
        ArtefactError: a layer's weight has another name there than `model_keys` knows, or two layers share one.
    """
    stored = {key for shard in shards for key in tensor_header(shard)}
    keys = model_keys(stored, model)
    # The output layer may be tied, and files have experts one by one.
    wanted_layers = (layer for layer in layers if layer != _OUTPUT and not _is_stack(model, layer))
    absent = {f"{layer}.weight" for layer in wanted_layers} - set(keys.values())
    if absent:
        wanted = min(absent)
        last = wanted.split(".")[-2]
        other = next((key for key in sorted(keys) if key.endswith(f".{last}.weight")), None)
        hint = f"; they have {other}" if other is not None else ""
        raise ArtefactError(
            f"the weight files have no {wanted}{hint}: their names are not those of the model, with or without the "
            f"prefix {model.base_model_prefix!r}. Load the model with transformers, save it with save_pretrained, and "
            "quantise that"
        )
    if len(set(keys.values())) < len(stored):
        raise ArtefactError(
            f"the weight files hold a tensor twice, with and without the prefix {model.base_model_prefix!r}: download "
            "the model again"
        )


def _is_stack(model: Any, layer: str) -> bool:
    return isinstance(model.get_submodule(layer), StackedLinear)


def write_quantised(shards: list[Path], packs: dict[str, Packed], file: Path, model: Any) -> None:
    """Write the weights of a quantised model: qweight, scales and zeros of the layers in `packs`, all else as it was.

    Args:
        shards: the dense weight files, which hold the layers (`require_weights`).
        packs: by module path.
        file: where to; it appears whole or not at all. Its keys are those of the model.
        model: the model. Of one with experts what the files have under other names is taken from here.
    """
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        with safe_open(shard, framework="pt") as stream:
            for key, name in model_keys(stream.keys(), model).items():
                if name.removesuffix(".weight") not in packs:
                    tensors[name] = stream.get_tensor(key)
    if any(_is_stack(model, name) for name in packs):
        rest = {
            name: tensor.cpu().contiguous()
            for name, tensor in model.state_dict().items()
            if name not in packs and name.removesuffix(".weight") not in packs
        }
        tensors = {name: tensors.get(name, tensor) for name, tensor in rest.items()}
    tensors |= tensors_of(packs)
    with atomic_path(file) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def tensors_of(packs: dict[str, Packed]) -> dict[str, Tensor]:
    """As a file has them: qweight, scales and zeros of every layer, on the CPU."""
    tensors = {}
    for name, packed in packs.items():
        tensors[f"{name}.{_CODES}"] = packed.words.cpu().contiguous()
        tensors[f"{name}.{_SCALES}"] = packed.scales.cpu().contiguous()
        if packed.zeros is not None:
            tensors[f"{name}.{_ZEROS}"] = packed.zeros.cpu().contiguous()
    return tensors


def read_quantised(file: Path, schemes: dict[str, Scheme], device: torch.device) -> dict[str, Packed]:
    """Codes, scales and zero points of the layers in `schemes`.

    Raises:
        ArtefactError: damaged, or without one of them.
    """
    packs = {}
    with (
        reading("quantised weights", file, KeyError, SafetensorError),
        safe_open(file, framework="pt", device=str(device)) as stream,
    ):
        for name, scheme in schemes.items():
            words, scales = stream.get_tensor(f"{name}.{_CODES}"), stream.get_tensor(f"{name}.{_SCALES}")
            zeros = stream.get_tensor(f"{name}.{_ZEROS}") if scheme.has_zeros else None
            group = scheme.group_of(words.shape[-2])
            packs[name] = Packed(words, scales, zeros, scheme.bits, group, (scales.shape[-1],))
    return packs
