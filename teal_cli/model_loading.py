"""Loading a model: dense, with the weights that its quantised self has, or as a TEAL checkpoint."""

from pathlib import Path
from typing import Any

from teal_cli.checkpoint.calibration import Calibration
from teal_cli.checkpoint.export import check_weights
from teal_cli.checkpoint.plan import carries_plan
from teal_cli.config import DecodingConfig, ModelConfig
from teal_cli.errors import ArtefactError
from teal_cli.hf import TealConfig  # importing it lets transformers load TEAL checkpoints
from teal_cli.models.architectures import Architecture, architecture_in, find_projections, output_projection
from teal_cli.models.loading import load_from_folder
from teal_cli.quantise.dequantise import dequantise_
from teal_cli.quantise.model import pack_, schemes_of
from teal_cli.quantise.storage import read_quantised
from teal_cli.ranks.group import Ranks, join
from teal_cli.reading import read_json
from teal_cli.schemes import Scheme
from teal_cli.shard_loading import cut_packed, load_shard
from teal_cli.sparse import lay_out_, sparse_layers, sparsify_
from teal_kernels.packing import Packed


def ranks_for(config: DecodingConfig) -> Ranks | None:
    """The group of ranks that a configuration asks for, which this process then is in; None where it is alone.

    Raises:
        TealError: what `join` raises.
    """
    return join(config.tensor_parallel, config.device, config.peer_timeout)


def load_model(
    folder: Path,
    *,
    device: str,
    dtype: str,
    architecture: Architecture | None = None,
    ranks: Ranks | None = None,
) -> Any:
    """A transformers model in eval mode; a TEAL checkpoint comes with sparse layers.

    Args:
        folder: the model's.
        device: `auto`, `cpu` or `cuda`.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        architecture: the model's, where it is not that of the table or of the checkpoint.
        ranks: that share the model; each loads its shard, onto its device.

    Raises:
        ArtefactError: transformers cannot load the folder, the weights are not those of the thresholds, or the
            thresholds were loaded and are not used.
        MachineError: no such device, or out of memory.
    """
    is_sparse = carries_plan(read_json(folder / "config.json", "model configuration"))
    if is_sparse:
        check_weights(folder)
    if ranks is not None:
        if is_sparse:
            return _load_sparse_shard(folder, ranks, dtype)
        return load_shard(folder, ranks, dtype=dtype, architecture=architecture).model
    model = load_from_folder(folder, device=device, dtype=dtype, architecture=architecture)
    # transformers only warns of a format that it does not know and goes on densely.
    if is_sparse and not sparse_layers(model):
        raise ArtefactError(f"{folder} carries thresholds but loaded dense: is another teal package in the way?")
    lay_out_(model)
    return model


def _load_sparse_shard(folder: Path, ranks: Ranks, dtype: str) -> Any:
    """A rank's shard of a TEAL checkpoint: thresholds are those of the whole model, and hold for its parts."""
    teal = TealConfig(**read_json(folder / "config.json", "model configuration")["quantization_config"])
    stored, schemes = teal.quantization, None
    if stored is not None:
        blocks = [name for name in teal.plan.projections if name != stored["output"]]
        schemes = schemes_of(blocks, Scheme.parse(str(stored["projections"])), stored["output"])
    group = max((scheme.group for scheme in (schemes or {}).values()), default=0)
    shard = load_shard(folder, ranks, dtype=dtype, architecture=teal.architecture, group=group, schemes=schemes)
    sparsify_(shard.model, teal.plan)
    pack_(shard.model, shard.packs)
    shard.model.config.quantization_config = teal
    return shard.model


def load_dense(
    folder: Path, config: ModelConfig, calibration: Calibration, ranks: Ranks | None = None
) -> tuple[Any, dict[str, Packed]]:
    """A dense model, with the quantised weights in place of its own where the calibration has such.

    With ranks, this one's shard of both.

    Returns:
        The model, and by module path what `pack_` puts in place of those weights; empty where nothing is quantised.

    Raises:
        TealError: what `architecture_in`, `load_model` and `read_quantised` raise.
    """
    model_type = str(read_json(folder / "config.json", "model configuration").get("model_type"))
    architecture = architecture_in(config.architecture, model_type)
    cuts = None
    if ranks is not None:
        group = config.quantise.group if config.quantise is not None else 0
        shard = load_shard(folder, ranks, dtype=config.dtype, architecture=architecture, group=group)
        model, cuts = shard.model, shard.plan
    else:
        model = load_model(folder, device=config.device, dtype=config.dtype, architecture=architecture)
    if calibration.quantised is None or config.quantise is None:
        return model, {}
    output = output_projection(model, "--quantise-output").name if config.quantise_output else None
    schemes = schemes_of((projection.name for projection in find_projections(model)), config.quantise, output)
    packs = read_quantised(calibration.quantised, schemes, model.device)
    if cuts is not None:
        packs = {name: cut_packed(packed, cuts.cut_of(name), name) for name, packed in packs.items()}
    dequantise_(model, packs)
    return model, packs
