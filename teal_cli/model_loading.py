"""Loading a model: dense, with the weights that its quantised self has, or as a TEAL checkpoint."""

from pathlib import Path
from typing import Any

import teal_cli.hf  # noqa: F401  (lets transformers load TEAL checkpoints)
from teal_cli.checkpoint.calibration import Calibration
from teal_cli.checkpoint.export import check_weights
from teal_cli.checkpoint.plan import carries_plan
from teal_cli.config import ModelConfig
from teal_cli.errors import ArtefactError
from teal_cli.models.architectures import Architecture, architecture_in, find_projections, output_projection
from teal_cli.models.loading import load_from_folder
from teal_cli.quantise.dequantise import dequantise_
from teal_cli.quantise.model import schemes_of
from teal_cli.quantise.storage import read_quantised
from teal_cli.reading import read_json
from teal_cli.sparse import lay_out_, sparse_layers
from teal_kernels.packing import Packed


def load_model(folder: Path, *, device: str, dtype: str, architecture: Architecture | None = None) -> Any:
    """A transformers model in eval mode; a TEAL checkpoint comes with sparse layers.

    Args:
        folder: the model's.
        device: `auto`, `cpu` or `cuda`.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        architecture: the model's, where it is not that of the table or of the checkpoint.

    Raises:
        ArtefactError: transformers cannot load the folder, the weights are not those of the thresholds, or the
            thresholds were loaded and are not used.
        MachineError: no such device, or out of memory.
    """
    is_sparse = carries_plan(read_json(folder / "config.json", "model configuration"))
    if is_sparse:
        check_weights(folder)
    model = load_from_folder(folder, device=device, dtype=dtype, architecture=architecture)
    # transformers only warns of a format that it does not know and goes on densely.
    if is_sparse and not sparse_layers(model):
        raise ArtefactError(f"{folder} carries thresholds but loaded dense: is another teal package in the way?")
    lay_out_(model)
    return model


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
    if calibration.quantised is None or config.quantise is None:
        return model, {}
    output = output_projection(model, "--quantise-output").name if config.quantise_output else None
    schemes = schemes_of((projection.name for projection in find_projections(model)), config.quantise, output)
    packs = read_quantised(calibration.quantised, schemes, model.device)
    dequantise_(model, packs)
    return model, packs
