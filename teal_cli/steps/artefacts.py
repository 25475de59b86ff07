"""The calibration and the checkpoint that a verb needs: found in the model's workspace, or made."""

from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from teal_cli.checkpoint import calibration as calibration_file
from teal_cli.checkpoint.calibration import Calibration, CalibrationInfo
from teal_cli.checkpoint.export import (
    ExportSummary,
    check_calibration_fits,
    check_checkpoint,
    read_summary,
    write_checkpoint,
)
from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.config import BenchConfig, ComparingConfig, DecodingConfig, GenerateConfig, ServeConfig, SparseConfig
from teal_cli.config_values import is_allocation_file
from teal_cli.console import Reporter
from teal_cli.decode.chat import Message
from teal_cli.errors import ArtefactError, UsageError
from teal_cli.model_source import ModelSource
from teal_cli.models.architectures import Projection, find_projections
from teal_cli.models.loading import outline, pick_device
from teal_cli.planning import allocate, allocations, recalibrate
from teal_cli.quantise.model import quantised_layers
from teal_cli.ranks.environment import is_rank
from teal_cli.schemes import INT8, Scheme
from teal_cli.shard_loading import check_divided
from teal_cli.sparse.control import backend_for
from teal_cli.steps.calibrate import calibrate
from teal_cli.steps.positions import require_fit
from teal_cli.workspace import Workspace
from teal_cli.writing import check_folder, require

_Comparing = TypeVar("_Comparing", bound=ComparingConfig)


def with_other_weights(
    config: _Comparing, workspace: Workspace, reporter: Reporter
) -> list[tuple[_Comparing, Workspace]]:
    """What `also_quantise` asks for: a configuration for each kind of weights, which is calibrated on the same text.

    Raises:
        UsageError: an exported model, or an encoder.
        ArtefactError: layers that cannot be quantised.
    """
    others = [(other, Workspace.of(other, reporter)) for other in config.others()]
    if not others:
        return []
    if workspace.kind(config) == "encoder":
        raise UsageError("also_quantise (flag --also-quantise) is for models that write, and this one is an encoder")
    model = outline(workspace.source.folder, workspace.architecture(config))
    quantised_layers(model, INT8, output_layer=config.quantise_output)  # or it says why not
    first = calibration_for(config, workspace, reporter)
    same = {key: getattr(first.info, key) for key in ("dataset", "tokens", "seq_len", "sink_tokens")}
    same["output_layer"] = any(projection.is_output for projection in first.projections)
    for other, _ in others:
        other._calibrate = other._calibrate.model_copy(update=same)
    return others


def make_for_ranks(config: DecodingConfig, reporter: Reporter, messages: list[Message] | None = None) -> None:
    """Make what ranks will look for: calibration and checkpoints, as one process makes them.

    Args:
        config: of the verb.
        reporter: told what is made.
        messages: of generate: what is going to be asked, where that is not the configuration's prompt.

    Raises:
        UsageError: a model that ranks cannot share.
        ArtefactError: texts that do not fit the model's context.
        TealError: as `checkpoint_for`.
    """
    if config.mode == "intrinsic" or getattr(config, "random_weights", False):
        return
    workspace = Workspace.of(config, reporter)
    if workspace.source.is_teal_checkpoint:
        return
    others = config.others() if isinstance(config, ComparingConfig) else []
    for its_config in (config, *others):
        _check_divided(its_config, workspace)
    require_fit(config, workspace, messages)
    every: list[tuple[DecodingConfig, Workspace]] = [(config, workspace)]
    if isinstance(config, ComparingConfig):
        every += with_other_weights(config, workspace, reporter)
    for its_config, its_workspace in every:
        if isinstance(its_config, GenerateConfig) and its_config.sparsity == 0.0:
            if its_config.quantise is not None:
                checkpoint_for(its_config, 0.0, its_workspace, reporter, allocation="uniform")
            continue
        if isinstance(its_config, ServeConfig) and not _targets(its_config) and its_config.quantise is None:
            continue
        calibration = calibration_for(its_config, its_workspace, reporter)
        for allocation in allocations(its_config, calibration, reporter):
            for target in [None] if is_allocation_file(allocation) else _targets(its_config):
                checkpoint_for(its_config, target, its_workspace, reporter, allocation=allocation)


def _targets(config: DecodingConfig) -> list[float | None]:
    asked = getattr(config, "sparsity", None)
    targets = (asked or [None]) if isinstance(asked, list) else [asked]
    if isinstance(config, ServeConfig):
        return [target for target in targets if target is None or target > 0]
    return [target for target in targets if target] if isinstance(config, BenchConfig) else targets


def _check_divided(config: DecodingConfig, workspace: Workspace) -> None:
    """Refuse what ranks cannot share before it is calibrated."""
    whole = outline(workspace.source.folder, workspace.architecture(config))
    schemes: dict[str, Scheme] = {}
    if config.quantise is not None:
        schemes = quantised_layers(whole, config.quantise, output_layer=config.quantise_output)
    check_divided(whole, config.tensor_parallel, workspace.kind(config), schemes)


def _require_alone(config: SparseConfig, what: str) -> None:
    """Refuse to make an artefact by several ranks.

    Raises:
        ArtefactError: this process is one of them.
    """
    if getattr(config, "tensor_parallel", 1) > 1 and is_rank():
        raise ArtefactError(
            f"there is no {what} for tensor_parallel (flag --tensor-parallel) to use: run it alone first"
        )


def calibration_for(config: SparseConfig, workspace: Workspace, reporter: Reporter) -> Calibration:
    """The calibration of a model: the one named, the one in its run folder, or a new one.

    Raises:
        ArtefactError: the one named or found is damaged, or of another model, quantisation or architecture.
        MachineError: the backend that is to read what comes of it cannot run here.
    """
    # Here, since what follows may take minutes. Backends that run at all run in float32.
    backend_for(getattr(config, "backend", "auto"), pick_device(config.device), torch.float32)
    run = config.calibration or workspace.run
    if config.calibration is None and not calibration_file.exists(run):
        _require_alone(config, "calibration, from teal calibrate,")
        reporter.say(f"no calibration of {workspace.source.name} in {run}: calibrating first")
        calibrate(config.calibrate.model_copy(update={"out": None}), reporter, workspace)
    found = calibration_file.load(run)
    check_calibration_fits(found, workspace.source.folder)
    if found.info.quantization != config.quantisation:
        raise ArtefactError(
            f"the calibration in {run} is of {found.info.quantization or 'unquantised'} weights, not of "
            f"{config.quantisation or 'unquantised'} ones: run `teal calibrate` for these"
        )
    _check_fits(found, outline(workspace.source.folder, workspace.architecture(config)))
    calibration_file.check_quantised(found)
    return found


def _check_fits(calibration: Calibration, model: Any) -> None:
    """Refuse what was measured at other sites or sizes than the model, whose architecture may be a user's file, has."""
    measured = calibration.projections
    with_output = any(projection.is_output for projection in measured)
    wanted = find_projections(model, output_layer=with_output)
    odd = {(p.name, p.site) for p in measured} ^ {(p.name, p.site) for p in wanted}
    if odd:
        raise ArtefactError(
            f"the calibration was made with another architecture, which differs at {min(odd)[0]}: "
            "run `teal calibrate` again"
        )
    for own, its in zip(measured, wanted, strict=True):
        if own != its:
            raise ArtefactError(
                f"the calibration has {_said(own)} where the model has {_said(its)}: run `teal calibrate` again"
            )
    if calibration.text is not None and int(calibration.text.max()) >= len(model.get_input_embeddings().weight):
        raise ArtefactError("the calibration's text has tokens that the model does not: run `teal calibrate` again")


def _said(projection: Projection) -> str:
    copies = f", {projection.copies} times" if projection.copies > 1 else ""
    chosen = f" of which a token reads {projection.chosen}" if projection.chosen is not None else ""
    return f"{projection.name} of {projection.in_features} inputs and {projection.out_features} outputs{copies}{chosen}"


def checkpoint_for(
    config: SparseConfig,
    sparsity: float | None,
    workspace: Workspace,
    reporter: Reporter,
    *,
    allocation: str | None = None,
    model: Any = None,
) -> Path:
    """The TEAL checkpoint to load: the model itself if it is one, else the export at this sparsity.

    A missing or outdated export is made, and said.

    Args:
        config: names calibration and allocation.
        sparsity: the target, or None for the checkpoint's own, the allocation file's own, or 0.5.
        workspace: the model's.
        reporter: where to say what is made.
        allocation: another than the configuration's only one.
        model: the dense model with sparse layers, where it is loaded already; takes on other thresholds.

    Raises:
        UsageError: the model is a TEAL checkpoint of another sparsity.
    """
    source = workspace.source
    if source.is_teal_checkpoint:
        own = source.plan.target_sparsity
        if sparsity is not None and sparsity != own:
            raise UsageError(f"{source.folder} was exported at sparsity {own}, not {sparsity}: name the dense model")
        require_own_plan(config, source)
        return source.folder
    calibration = calibration_for(config, workspace, reporter)
    plan = allocate(config, calibration, sparsity, allocation or allocations(config, calibration, reporter)[0])
    folder = workspace.export_folder(plan.allocation, plan.target_sparsity)
    # An imported calibration has no text to recalibrate on: only who asks for it by name is to be told so again.
    recalibrated = config.recalibrate and ("recalibrate" in config.model_fields_set or not calibration.info.imported)
    if not _up_to_date(folder, calibration, plan, recalibrated):
        _require_alone(config, "checkpoint, from teal export,")
        reporter.say(f"no export of {source.name} at sparsity {plan.target_sparsity:g} in {folder}: exporting it")
        write_recalibrated(config, plan, calibration, workspace, folder, reporter, model=model)
    return folder


def write_recalibrated(
    config: SparseConfig,
    plan: SparsityPlan,
    calibration: Calibration,
    workspace: Workspace,
    folder: Path,
    reporter: Reporter,
    *,
    weights: Literal["link", "copy"] = "link",
    model: Any = None,
) -> ExportSummary:
    """Measure the thresholds of a plan again in the sparse network, and write the checkpoint.

    Args:
        config: whether to, and how the weights are quantised.
        plan: from `allocate`.
        calibration: what it was made from.
        workspace: the model's.
        folder: to write.
        reporter: told what takes a while.
        weights: see `write_checkpoint`.
        model: see `recalibrate`.

    Raises:
        TealError: what `recalibrate` and `write_checkpoint` raise.
    """
    require(check_folder, folder.parent)
    plan, recalibrated = recalibrate(config, plan, calibration, workspace.source, reporter, model)
    return write_checkpoint(
        workspace.source.folder,
        plan,
        calibration,
        folder,
        weights,
        recalibrated=recalibrated,
        quantization=config.stored_quantisation,
        architecture=workspace.row(config),
    )


def require_own_plan(config: SparseConfig, source: ModelSource) -> None:
    """Refuse options that would make other thresholds than those that a TEAL checkpoint has.

    Raises:
        UsageError: one was given.
    """
    for key in ("calibration", "allocation", "limits", "cost"):
        if key in config.model_fields_set and getattr(config, key):
            raise UsageError(f"{source.folder} has its thresholds: {key} (flag --{key}) needs the dense model")


def _up_to_date(folder: Path, calibration: Calibration, plan: SparsityPlan, recalibrated: bool) -> bool:
    """Whether an export is whole, made from this very calibration, with these sparsities, and such thresholds."""
    if not (folder / "config.json").is_file():
        return False
    try:
        made = check_checkpoint(folder)
        summary = read_summary(folder)
    except (ArtefactError, OSError):
        return False
    wanted = {name: rule.expected_sparsity for name, rule in plan.projections.items()}
    return (
        CalibrationInfo(**summary["calibration"]) == calibration.info
        and {name: rule.expected_sparsity for name, rule in made.projections.items()} == wanted
        and summary["propagated"] == (recalibrated and any(wanted.values()))
    )
