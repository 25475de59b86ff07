"""Writing a TEAL checkpoint: the dense folder, linked or copied, with thresholds in its config."""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from teal_cli.atomic import atomic_folder, check_seal, sealed
from teal_cli.checkpoint.calibration import Calibration, CalibrationInfo
from teal_cli.checkpoint.digests import configuration_digest, file_digests, tensor_digests
from teal_cli.checkpoint.fields import Content, Digest, Flag, Moment, Name, Share, Size, checked
from teal_cli.checkpoint.plan import SparsityPlan, StoredRule, carries_plan, check_is_whole, quantization_config
from teal_cli.errors import ArtefactError, shown
from teal_cli.models.companions import companion_files
from teal_cli.models.weights import fingerprint, weight_files
from teal_cli.reading import read_json
from teal_cli.version import __version__
from teal_cli.versions import now

_SUMMARY = "teal.json"
_ALLOCATION = "allocation.yaml"
_MOST_READ = 32 << 30
"""Bytes of linked weights that an export reads for their digests: some seconds, at 1.8 GB a second and thread."""


@dataclass(frozen=True)
class ExportSummary:
    """What an export wrote."""

    folder: str
    target_sparsity: float
    allocation: str
    projections: int
    weights: str
    """link or copy: how the weight files came here."""
    propagated: bool
    """Whether the thresholds are the sparse network's own."""


def check_calibration_fits(calibration: Calibration, dense: Path) -> str:
    """The fingerprint of the dense weights, if the calibration was made with them.

    Raises:
        ArtefactError: calibrated with other weights or another configuration.
    """
    digest = fingerprint(dense)
    if calibration.info.weights != digest:
        raise ArtefactError(
            f"the calibration was made with another model ({calibration.info.model}, weights "
            f"{calibration.info.weights[:12]}) than {dense} (weights {digest[:12]}): run `teal calibrate` for this one"
        )
    if calibration.info.configuration not in ("", configuration_digest(dense)):
        raise ArtefactError(
            f"config.json of {dense} has changed since the calibration: run `teal calibrate` again, or take back what "
            "was changed"
        )
    return digest


def check_weights(folder: Path) -> None:
    """Compare weights and thresholds of a TEAL checkpoint with what its teal.json says of them.

    A folder that transformers saved again has no teal.json, and perhaps another dtype: it is not compared.

    Raises:
        ArtefactError: other weights, or another export's thresholds.
    """
    if (folder / _SUMMARY).exists():
        check_checkpoint(folder)


def check_checkpoint(folder: Path) -> SparsityPlan:
    """The thresholds of a TEAL checkpoint as `teal export` wrote it, checked against its teal.json and its weights.

    Raises:
        ArtefactError: something is missing, damaged, or another export's.
    """
    summary = read_summary(folder)
    config = read_json(folder / "config.json", "model configuration")
    check_is_whole(folder, config)
    plan = SparsityPlan.from_dict(config["quantization_config"])
    own = (plan.allocation, plan.target_sparsity)
    entries = {entry["name"]: StoredRule.model_validate(entry).to_rule() for entry in summary["projections"]}
    if own != (summary["allocation"], summary["target_sparsity"]) or entries != plan.projections:
        raise ArtefactError(
            f"the thresholds in {folder}/config.json are not those of its {_SUMMARY}, but another export's: "
            "export it again"
        )
    if summary["weights"] != fingerprint(folder):
        raise ArtefactError(f"the weights of {folder} are not those that its thresholds were made for: export it again")
    if summary["calibration"].get("configuration", "") not in ("", configuration_digest(folder)):
        raise ArtefactError(
            f"config.json of {folder} was altered: export it again, from the model with that configuration"
        )
    return plan


def write_checkpoint(
    dense: Path,
    plan: SparsityPlan,
    calibration: Calibration,
    out: Path,
    weights: Literal["link", "copy"],
    *,
    recalibrated: bool = False,
    quantization: dict[str, Any] | None = None,
    architecture: dict[str, Any] | None = None,
) -> ExportSummary:
    """Write an ordinary transformers folder whose config carries the plan.

    The weight files hold exactly the dense keys: they are the dense files, as hard links (symbolic
    links across file systems) or copies. Of quantised weights they are the calibration's. The folder
    appears whole or not at all.

    Args:
        dense: the dense model's folder.
        plan: sparsity and threshold of every projection.
        calibration: what the plan was made from; must be of the same weights.
        out: folder to write; an earlier TEAL checkpoint is replaced when the new one is whole.
        weights: "link" or "copy".
        recalibrated: whether the thresholds were measured in the sparse network (`sparse.recalibrate_`).
        quantization: how the weights are quantised (`teal_cli.hf.TealConfig.quantization`), those of the calibration.
        architecture: the model's row, where the table of architectures does not have it.

    Raises:
        ArtefactError: the calibration is of another model, `dense` is a quantised model, or `out`
            holds something else than a TEAL checkpoint.
    """
    digest = check_calibration_fits(calibration, dense)
    config = read_json(dense / "config.json", "model configuration")
    stored = config.get("quantization_config")
    if stored:
        method = shown(stored.get("quant_method") if isinstance(stored, dict) else stored)
        raise ArtefactError(f"{dense} is already quantised ({method}): export from the dense model")
    if out.exists() and not _may_replace(out):
        raise ArtefactError(f"{out} exists and is not a TEAL checkpoint: it is not replaced; give another --out")
    with atomic_folder(out) as temporary:
        if quantization is None or calibration.quantised is None:
            for shard in weight_files(dense):
                _place(shard, temporary / shard.name, weights)
        else:
            _place(calibration.quantised, temporary / "model.safetensors", weights)
            digest = fingerprint(temporary)
            if quantization["output"] is not None:
                config["tie_word_embeddings"] = False
        for file in companion_files(dense, with_index=quantization is None):
            shutil.copyfile(file, temporary / file.name)
        config["quantization_config"] = quantization_config(plan, quantization, architecture)
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (temporary / _ALLOCATION).write_text(plan.allocation_yaml(), encoding="utf-8")
        made = {"propagated": recalibrated, **_digests(temporary, weights)}
        summary = sealed({**_summary(plan, calibration, digest), **made})
        (temporary / _SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return ExportSummary(str(out), plan.target_sparsity, plan.allocation, len(plan.projections), weights, recalibrated)


class _Projection(StoredRule):
    name: Name
    in_features: Size
    out_features: Size


class _Summary(Content):
    """teal.json."""

    teal_version: Name = ""
    finished: Moment | None = None
    weights: Name
    tensors: dict[Name, Digest] = Field(default_factory=dict)
    files: dict[Name, Digest] = Field(default_factory=dict)
    calibration: CalibrationInfo
    allocation: Name
    target_sparsity: Share
    projections: list[_Projection]
    propagated: Flag | None = None


def _may_replace(folder: Path) -> bool:
    """Whether a folder is empty or a TEAL checkpoint, perhaps a damaged one."""
    if not folder.is_dir():
        return False
    if not any(folder.iterdir()) or (folder / _SUMMARY).is_file():
        return True
    try:
        return carries_plan(read_json(folder / "config.json", "model configuration"))
    except ArtefactError:
        return False


def read_summary(folder: Path) -> dict[str, Any]:
    """teal.json of a TEAL checkpoint, with defaults for what older versions did not write.

    Raises:
        ArtefactError: missing or damaged.
    """
    path = folder / _SUMMARY
    content = read_json(path, "checkpoint summary")
    found = checked(_Summary, content, "checkpoint summary", path, "export it again")
    check_seal(content, "checkpoint summary", path, "export it again")
    return found.model_dump()


def _place(source: Path, target: Path, weights: Literal["link", "copy"]) -> None:
    source = source.resolve()  # the hub's cache holds symbolic links
    if weights == "copy":
        shutil.copyfile(source, target)
        return
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        target.symlink_to(source)


def _digests(folder: Path, weights: Literal["link", "copy"]) -> dict[str, dict[str, str]]:
    """What `verify.verified` compares with; not of weights that are only linked and take long to read."""
    files = weight_files(folder)
    quick = weights == "copy" or sum(file.stat().st_size for file in files) <= _MOST_READ
    return {"tensors": tensor_digests(files) if quick else {}, "files": file_digests(folder)}


def _summary(plan: SparsityPlan, calibration: Calibration, digest: str) -> dict[str, Any]:
    shapes = {projection.name: projection for projection in calibration.projections}
    return {
        "teal_version": __version__,
        "finished": now(),
        "weights": digest,
        "calibration": asdict(calibration.info),
        "allocation": plan.allocation,
        "target_sparsity": plan.target_sparsity,
        "projections": [
            {
                "name": name,
                "in_features": shapes[name].in_features,
                "out_features": shapes[name].out_features,
                **rule.stored(),
            }
            for name, rule in plan.projections.items()
        ],
    }
