"""Writing what a run leaves behind: an ordinary folder, with thresholds where the recipe has some."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from teal_cli.adapt.recipe import Outcome
from teal_cli.atomic import atomic_folder
from teal_cli.checkpoint.adapted import ADAPTED, is_adapted
from teal_cli.checkpoint.calibration import Calibration, CalibrationInfo
from teal_cli.checkpoint.digests import configuration_digest
from teal_cli.checkpoint.export import write_checkpoint
from teal_cli.errors import ArtefactError
from teal_cli.models.architectures import find_projections
from teal_cli.models.companions import companion_files
from teal_cli.models.loading import DTYPES, stored_dtype, without_bars
from teal_cli.models.weights import fingerprint, weight_files
from teal_cli.reading import read_json


def check_replaceable(out: Path) -> None:
    """Refuse to write over what is no adapted model.

    Raises:
        ArtefactError: something else is there.
    """
    if out.exists() and not (out.is_dir() and (is_adapted(out) or not any(out.iterdir()))):
        raise ArtefactError(f"{out} exists and is no adapted model: it is not replaced; give another --out")


def write_adapted(
    source: Path,
    out: Path,
    model: Any,
    outcome: Outcome,
    record: Mapping[str, Any],
    info: CalibrationInfo,
    architecture: dict[str, Any] | None = None,
) -> None:
    """Write the adapted model; the folder appears whole or not at all.

    Args:
        source: the dense model's folder, whose tokenizer and dtype are kept.
        out: where to; an earlier adapted model is replaced.
        model: in memory, after `finish_`.
        outcome: of the recipe.
        record: adapt.json.
        info: what the thresholds were measured on; `weights` and `configuration` are filled in here.
        architecture: the model's row, where the table of architectures does not have it.

    Raises:
        ArtefactError: what `write_checkpoint` raises.
    """
    projections = find_projections(model, output_layer=_has_output(model, outcome))
    if outcome.plan is None:
        with atomic_folder(out) as folder:
            _write_dense(source, folder, model, outcome, record)
        return
    dense = out.parent / f".{out.name}.dense"
    shutil.rmtree(dense, ignore_errors=True)
    try:
        with atomic_folder(dense) as folder:
            _write_dense(source, folder, model, outcome, record)
        made = replace(info, weights=fingerprint(dense), configuration=configuration_digest(dense))
        calibration = Calibration(made, projections, {}, {})
        write_checkpoint(dense, outcome.plan, calibration, out, "link", recalibrated=True, architecture=architecture)
    finally:
        shutil.rmtree(dense, ignore_errors=True)


def _has_output(model: Any, outcome: Outcome) -> bool:
    return outcome.plan is not None and any(
        model.get_submodule(name) is model.get_output_embeddings() for name in outcome.plan.projections
    )


def _write_dense(source: Path, folder: Path, model: Any, outcome: Outcome, record: Mapping[str, Any]) -> None:
    """Weights under the dense model's keys and in its dtype, its configuration with the recipe's entries, the rest."""
    config = read_json(source / "config.json", "model configuration")
    dtype = DTYPES.get(stored_dtype(source, config) or "")
    values: dict[str, Tensor] = {**model.state_dict(), **outcome.tensors}
    stored = {
        key: (value if dtype is None or not value.is_floating_point() else value.to(dtype)).cpu().contiguous()
        for key, value in values.items()
    }
    with without_bars():
        model.save_pretrained(folder, state_dict=stored)
    kept = {file.name for file in weight_files(folder)}
    for file in folder.iterdir():
        if file.name not in kept and file.name != "model.safetensors.index.json":
            file.unlink()
    for file in companion_files(source, with_index=False):
        if file.name != ADAPTED:
            shutil.copyfile(file, folder / file.name)
    (folder / "config.json").write_text(json.dumps({**config, **outcome.config}, indent=2) + "\n", encoding="utf-8")
    (folder / ADAPTED).write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
