"""What a run folder or a checkpoint holds, as data: the result of `teal inspect`, and tables of the page."""

from pathlib import Path
from typing import Any

from teal_cli.checkpoint.calibration import check_quantised
from teal_cli.errors import ArtefactError
from teal_cli.models.weights import weight_files
from teal_cli.reading import read_json
from teal_cli.report.inputs import Export, Material, when
from teal_cli.report.layers import grid_of, places_of, short_name
from teal_cli.report.summary import summary


def describe_export(export: Export, material: Material) -> dict[str, Any]:
    """A TEAL checkpoint without its projections."""
    summary_file = export.folder / ("teal.json" if export.summary else "config.json")
    realised = material.realised(export)
    files: list[Path] = []
    problem = None
    try:
        files = weight_files(export.folder)
    except ArtefactError as error:  # a report needs no weights: it is the reader who should know
        problem = str(error)
    return {
        "name": export.name,
        "folder": str(export.folder),
        "finished": when(summary_file, export.summary),
        "allocation": export.plan.allocation,
        "target_sparsity": export.plan.target_sparsity,
        "realised_sparsity": None if realised is None else realised.model_wide,
        "realised_from": None if realised is None else str(realised.file),
        "propagated": export.summary.get("propagated"),
        "quantization": export.quantization,
        "weights": export.summary.get("weights"),
        "weight_files": len(files),
        "weight_bytes": sum(file.stat().st_size for file in files),
        "problem": problem,
        "mean_by_kind": _means(export),
    }


def _means(export: Export) -> dict[str, float]:
    """Mean sparsity of the projections of each kind; those of one kind are alike in size."""
    values: dict[str, list[float]] = {}
    places = places_of(export.plan.projections)
    for name, rule in export.plan.projections.items():
        if rule.expected_sparsity is not None:
            values.setdefault(short_name(name, places), []).append(rule.expected_sparsity)
    return {kind: sum(found) / len(found) for kind, found in values.items()}


def describe_projections(export: Export, material: Material) -> list[dict[str, Any]]:
    """Every projection of a checkpoint: its place, size, sparsity and threshold; sizes where teal.json tells them."""
    realised = material.realised(export)
    sizes = {entry["name"]: entry for entry in export.summary.get("projections", [])}
    places = places_of(export.plan.projections)
    found = []
    for name, rule in export.plan.projections.items():
        size = sizes.get(name, {})
        found.append(
            {
                "name": name,
                "layer": places[name].layer if name in places else None,
                "kind": short_name(name, places),
                "in_features": size.get("in_features"),
                "out_features": size.get("out_features"),
                "sparsity": rule.expected_sparsity,
                "realised": None if realised is None else realised.by_projection.get(name),
                "threshold": max(rule.threshold, 0.0),
            }
        )
    return found


def describe_calibration(material: Material) -> dict[str, Any] | None:
    """What the thresholds come from; of a checkpoint without its run folder, what teal.json says."""
    if material.calibration is None or material.run is None:
        focus = material.focus
        return dict(focus.summary["calibration"]) if focus is not None and focus.summary else None
    file = material.run / "calibration.json"
    problem = None
    try:
        check_quantised(material.calibration)
    except ArtefactError as error:  # as of an export
        problem = str(error)
    grid = grid_of(projection.name for projection in material.calibration.projections)
    return {
        **vars(material.calibration.info),
        "finished": when(file, read_json(file, "calibration")),
        "problem": problem,
        "layers": len(grid.labels),
        "sites": len(material.calibration.histograms),
        "projections": len(material.calibration.projections),
    }


def describe_results(material: Material) -> list[dict[str, Any]]:
    """The JSON results: which verb made them, when, and how."""
    return [
        {
            "file": str(result.file),
            "verb": result.verb,
            "finished": when(result.file, result.content),
            "command": result.content.get("command"),
            "config": result.content.get("config"),
            "device": result.content.get("device"),
            "dtype": result.content.get("dtype"),
            "versions": result.content.get("versions"),
        }
        for result in material.results
    ]


def describe(material: Material) -> dict[str, Any]:
    """The contract of `teal inspect --json` (docs/formats.md); of a checkpoint, with all of its projections."""
    focus = material.focus if material.is_checkpoint else None
    return {
        "kind": "run" if focus is None else "checkpoint",
        "name": material.name,
        "model": material.model,
        "summary": {line.label.lower(): line.text for line in summary(material)},
        "calibration": describe_calibration(material),
        "exports": [describe_export(export, material) for export in material.exports],
        "projections": [] if focus is None else describe_projections(focus, material),
        "results": describe_results(material),
    }
