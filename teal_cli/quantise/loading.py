"""Loading a dense model with the weights that its quantised self has."""

from pathlib import Path
from typing import Any

from teal_cli.checkpoint.calibration import Calibration
from teal_cli.config import ModelConfig
from teal_cli.models.architectures import architecture_in, find_projections, output_projection
from teal_cli.models.loading import load_model
from teal_cli.quantise.dequantise import dequantise_
from teal_cli.quantise.model import schemes_of
from teal_cli.quantise.storage import read_quantised
from teal_cli.reading import read_json
from teal_kernels.packing import Packed


def load_dense(folder: Path, config: ModelConfig, calibration: Calibration) -> tuple[Any, dict[str, Packed]]:
    """A dense model, with the quantised weights in place of its own where the calibration has such.

    Returns:
        The model, and by module path what `pack_` puts in place of those weights; empty where nothing is quantised.

    Raises:
        TealError: what `architecture_in`, `load_model` and `read_quantised` raise.
    """
    model_type = str(read_json(folder / "config.json", "model configuration").get("model_type"))
    architecture = architecture_in(config.architecture, model_type)
    model = load_model(folder, device=config.device, dtype=config.dtype, architecture=architecture)
    if calibration.quantised is None or config.quantize is None:
        return model, {}
    output = output_projection(model, "--quantize-output").name if config.quantize_output else None
    schemes = schemes_of((projection.name for projection in find_projections(model)), config.quantize, output)
    packs = read_quantised(calibration.quantised, schemes, model.device)
    dequantise_(model, packs)
    return model, packs
