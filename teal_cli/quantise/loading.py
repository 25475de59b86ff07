"""Loading a dense model with the weights that its quantised self has."""

from pathlib import Path
from typing import Any

from teal_cli.checkpoint.files import read_json
from teal_cli.config import ModelConfig
from teal_cli.models.architectures import architecture_in
from teal_cli.models.loading import load_model
from teal_cli.quantise.model import quantise_
from teal_cli.quantise.scheme import Scheme
from teal_kernels.packing import Packed


def load_dense(folder: Path, config: ModelConfig) -> tuple[Any, dict[str, Packed]]:
    """A dense model, its weights quantised and dequantised where the configuration asks for it.

    Returns:
        The model, and by module path what `pack_` puts in place of those weights; empty where nothing is quantised.

    Raises:
        TealError: what `load_model` raises.
    """
    model_type = str(read_json(folder / "config.json", "model configuration").get("model_type"))
    architecture = architecture_in(config.architecture, model_type)
    model = load_model(folder, device=config.device, dtype=config.dtype, architecture=architecture)
    return model, quantised_(model, config)


def quantised_(model: Any, config: ModelConfig) -> dict[str, Packed]:
    """Quantise a model that is loaded, as the configuration asks."""
    if config.quantize is None:
        return {}
    return quantise_(model, Scheme.parse(config.quantize), output_layer=config.quantize_output)
