"""Quantised weights on disk: dense safetensors files in, one file with codes, scales and zero points out."""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from teal_cli.checkpoint.files import atomic_path
from teal_cli.checkpoint.weights import tensor_header
from teal_cli.errors import ArtefactError, reading
from teal_cli.quantise.scheme import Scheme
from teal_kernels.packing import Packed

_OUTPUT = "lm_head"
_CODES, _SCALES, _ZEROS = "qweight", "scales", "zeros"


def require_weights(shards: list[Path], names: Iterable[str]) -> None:
    """Refuse a model whose weight files do not hold the weights of these layers under the names that it has for them.

    Args:
        shards: the dense weight files.
        names: module paths.

    Raises:
        ArtefactError: another name.
    """
    stored = {key.removesuffix(".weight") for shard in shards for key in tensor_header(shard)}
    absent = set(names) - stored - {_OUTPUT}  # it may be tied
    if absent:
        raise ArtefactError(
            f"the weight files have no {min(absent)}.weight: checkpoints of this family cannot be quantised"
        )


def write_quantised(shards: list[Path], packs: dict[str, Packed], file: Path) -> None:
    """Write the weights of a quantised model: qweight, scales and zeros of the layers in `packs`, all else as it was.

    Args:
        shards: the dense weight files, which hold the layers (`require_weights`).
        packs: by module path.
        file: where to; it appears whole or not at all.
    """
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        with safe_open(shard, framework="pt") as stream:
            for key in stream.keys():  # noqa: SIM118  (not a mapping)
                if key.removesuffix(".weight") not in packs:
                    tensors[key] = stream.get_tensor(key)
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
            packs[name] = Packed(words, scales, zeros, scheme.bits, scheme.group_of(len(words)), (scales.shape[1],))
    return packs
