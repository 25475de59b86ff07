"""Loading a dense model with the weights that its quantised self has."""

from pathlib import Path
from typing import Any

from teal_cli.config import ModelConfig
from teal_cli.models.loading import load_model, pick_device
from teal_cli.models.offload import offload_
from teal_cli.quantise.model import quantise_
from teal_cli.quantise.scheme import Scheme
from teal_kernels.packing import Packed


def load_dense(folder: Path, config: ModelConfig, *, offload: bool = False) -> tuple[Any, dict[str, Packed]]:
    """A dense model, its weights quantised and dequantised where the configuration asks for it.

    Args:
        folder: the model's.
        config: device, dtype, quantisation.
        offload: leave the weights in main memory, and compute on the device.

    Returns:
        The model, and by module path what `pack_` puts in place of those weights; empty where nothing is quantised.

    Raises:
        TealError: what `load_model` raises.
    """
    model = load_model(folder, device="cpu" if offload else config.device, dtype=config.dtype)
    packs = quantised_(model, config)
    if offload:
        offload_(model, pick_device(config.device))
    return model, packs


def quantised_(model: Any, config: ModelConfig) -> dict[str, Packed]:
    """Quantise a model that is loaded, as the configuration asks."""
    if config.quantize is None:
        return {}
    return quantise_(model, Scheme.parse(config.quantize), output_layer=config.quantize_output)
