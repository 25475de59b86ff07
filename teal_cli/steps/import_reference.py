"""Import: files of the method's reference implementation in, a calibration and an allocation file out."""

from collections.abc import Iterable
from pathlib import Path

from teal_cli.allocation import make_plan
from teal_cli.atomic import atomic_path
from teal_cli.checkpoint import calibration as calibration_file
from teal_cli.checkpoint.calibration import Calibration, CalibrationInfo
from teal_cli.checkpoint.digests import configuration_digest
from teal_cli.config import ImportConfig
from teal_cli.console import Reporter
from teal_cli.errors import ArtefactError
from teal_cli.importing.rebin import SignedHistogram
from teal_cli.importing.reference import histogram_folder, read_histograms, read_lookup, tokens_counted
from teal_cli.models.aliases import alias_names, find_alias
from teal_cli.models.architectures import find_projections
from teal_cli.models.loading import outline
from teal_cli.models.weights import fingerprint
from teal_cli.steps.calibrate import run_folder
from teal_cli.versions import library_versions
from teal_cli.workspace import Workspace, digits_of
from teal_cli.writing import check_folder, require

_CROWDED = 0.01
"""Share of a site's values in one bin that is worth a word: more than any threshold should be off by."""


def import_reference(
    folder: Path, config: ImportConfig, reporter: Reporter, workspace: Workspace | None = None
) -> tuple[Calibration, list[Path]]:
    """Write the calibration that a folder of TEAL's files amounts to, and its lookup's allocation files.

    Args:
        folder: a published model folder (histograms/, perhaps lookup/ beside it), or the histograms' own.
        config: the model, the targets of the allocation files, and where to.
        reporter: told what cannot be known.
        workspace: the model's.

    Returns:
        The calibration, and the allocation files; none where there is no lookup.

    Raises:
        ArtefactError: damaged files, those of another model, or a measured calibration in the way.
        UsageError: a target that the lookup does not reach.
    """
    source = histogram_folder(folder)
    workspace = workspace or Workspace.of(config, reporter)
    workspace.require_dense("import")
    run = run_folder(config, workspace)
    require(check_folder, run)
    if calibration_file.exists(run) and not calibration_file.load(run).info.imported:
        raise ArtefactError(f"{run} holds a calibration that was measured, and knows more: give another --out")
    projections = find_projections(outline(workspace.source.folder))
    signed = read_histograms(source, projections)
    try:
        tokens = tokens_counted(signed, projections)
    except ArtefactError as error:
        raise ArtefactError(f"{error}{_hint(_alike(signed))}") from error
    lookup = source.parent / "lookup"
    paths = read_lookup(lookup, projections) if lookup.is_dir() else {}
    info = CalibrationInfo(
        model=workspace.source.name,
        weights=fingerprint(workspace.source.folder),
        configuration=configuration_digest(workspace.source.folder),
        dataset="",
        tokens=tokens,
        seq_len=0,
        sink_tokens=0,
        seed=config.seed,
        dtype="unknown",
        device="unknown",
        seconds=0.0,
        versions=library_versions(),
        imported=str(folder),
    )
    histograms = {site: counts.of_magnitudes() for site, counts in signed.items()}
    result = Calibration(info, projections, histograms, paths=paths)
    plans = [make_plan(result, target, "greedy") for target in config.sparsity] if paths else []
    calibration_file.save(result, run)
    files = []
    for plan in plans:
        files.append(run / f"lookup-{digits_of(plan.target_sparsity)}.yaml")
        with atomic_path(files[-1]) as temporary:
            temporary.write_text(plan.allocation_yaml(), encoding="utf-8")
    _warn(signed, workspace.source.name, reporter)
    return result, files


def _warn(signed: dict[str, SignedHistogram], name: str, reporter: Reporter) -> None:
    """Say what the files do not."""
    reporter.say("imported calibrations have no sensitivities (for fisher) and no text (to recalibrate thresholds)")
    for site, counts in signed.items():
        share, middle = counts.fullest()
        if share > _CROWDED:
            reporter.say(
                f"{site}: {share:.1%} of the values lie in one bin at {middle:.1g} (padding was counted?): "
                "its thresholds are doubtful"
            )
    others = [alias for alias in _alike(signed) if alias != name]
    if others:
        reporter.say(f"the files could as well be those of {', '.join(others)}: `teal eval` shows whether they fit")


def _alike(signed: dict[str, SignedHistogram]) -> list[str]:
    """Aliases with as many layers, and as wide an MLP over their hidden state, as the histograms have."""
    totals = [counts.total for counts in signed.values()]
    layers, ratio = len(totals) // 4, totals[3] / totals[2]

    def fits(shape: dict[str, object]) -> bool:
        wide, hidden = shape.get("intermediate_size"), shape.get("hidden_size")
        if not (isinstance(wide, int) and isinstance(hidden, int)):
            return False
        return shape.get("num_hidden_layers") == layers and abs(wide / hidden - ratio) < 1e-3

    return [alias.name for alias in map(find_alias, alias_names()) if alias is not None and fits(alias.shape)]


def _hint(names: Iterable[str]) -> str:
    known = ", ".join(names)
    return f"; {known} would fit" if known else ""
