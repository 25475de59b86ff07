"""Writing quantised weights: dense safetensors files in, one file with codes, scales and zero points out."""

from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from teal_cli.errors import ArtefactError
from teal_cli.quantise.scheme import Scheme
from teal_cli.quantise.values import quantise

_EMBEDDING = "model.embed_tokens.weight"
_OUTPUT = "lm_head"


def write_quantised(shards: list[Path], schemes: dict[str, Scheme], folder: Path) -> None:
    """Write `model.safetensors`: quantised layers have qweight, scales and zeros, everything else is as it was.

    Args:
        shards: the dense weight files.
        schemes: by module path. An output layer tied to the embedding gets weights of its own.
        folder: where to.

    Raises:
        ArtefactError: weights that the files hold under other names than the model.
    """
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        with safe_open(shard, framework="pt") as stream:
            for key in stream.keys():  # noqa: SIM118  (not a mapping)
                tensor = stream.get_tensor(key)
                name = key.removesuffix(".weight")
                if name in schemes and key != name:
                    tensors |= _quantised(name, tensor, schemes[name])
                else:
                    tensors[key] = tensor
    for name, scheme in schemes.items():
        if f"{name}.qweight" not in tensors:  # tied
            if name != _OUTPUT or _EMBEDDING not in tensors:
                raise ArtefactError(
                    f"the weight files have no {name}.weight: checkpoints of this family cannot be quantised"
                )
            tensors |= _quantised(name, tensors[_EMBEDDING], scheme)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _quantised(name: str, weight: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    packed = quantise(weight, scheme)
    found = {f"{name}.qweight": packed.words, f"{name}.scales": packed.scales}
    return found if packed.zeros is None else found | {f"{name}.zeros": packed.zeros}
