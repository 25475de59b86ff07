"""Quantised weights on disk: dense safetensors files in, one file with codes, scales and zero points out."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from teal_cli.checkpoint.files import atomic_path
from teal_cli.errors import ArtefactError, reading
from teal_cli.quantise.scheme import Scheme
from teal_kernels.packing import Packed

_OUTPUT = "lm_head"
_CODES, _SCALES, _ZEROS = "qweight", "scales", "zeros"


def write_quantised(shards: list[Path], packs: dict[str, Packed], file: Path) -> None:
    """Write the weights of a quantised model: qweight, scales and zeros of the layers in `packs`, all else as it was.

    Args:
        shards: the dense weight files.
        packs: by module path.
        file: where to; it appears whole or not at all.

    Raises:
        ArtefactError: weights that the files hold under other names than the model.
    """
    tensors: dict[str, Tensor] = {}
    left = set(packs)
    for shard in shards:
        with safe_open(shard, framework="pt") as stream:
            for key in stream.keys():  # noqa: SIM118  (not a mapping)
                if key.removesuffix(".weight") not in left:
                    tensors[key] = stream.get_tensor(key)
                left.discard(key.removesuffix(".weight"))
    left.discard(_OUTPUT)  # it may be tied
    if left:
        raise ArtefactError(
            f"the weight files have no {min(left)}.weight: checkpoints of this family cannot be quantised"
        )
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
