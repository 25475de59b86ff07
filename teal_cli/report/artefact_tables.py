"""Artefacts as Rich tables: what `teal inspect` prints, and the page shows."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from teal_cli.plain_table import PlainTable, facts_table
from teal_cli.report.layers import grid_of

_Projection = dict[str, Any]


def calibration_facts(calibration: dict[str, Any]) -> PlainTable:
    """What was measured, on what, and when."""
    table = facts_table("Calibration")
    rows = {
        "model": calibration["model"],
        "weights": f"fingerprint {calibration['weights'][:16]}"
        + (f", quantised to {calibration['quantization']}" if calibration.get("quantization") else ""),
        "text": f"{calibration['tokens']:,} tokens of {calibration['dataset']}, in sequences of "
        f"{calibration['seq_len']:,}, without the first {calibration['sink_tokens']} of each",
        "sensitivities": f"{calibration['sensitivity_tokens']:,} tokens",
        "greedy paths": f"{calibration['greedy_tokens']:,} tokens",
        "measured in": f"{calibration['dtype']} on {calibration['device']}, {calibration['seconds']:.0f} s",
        "finished": calibration.get("finished", "not recorded"),
        "versions": versions_text(calibration["versions"]),
    }
    if calibration.get("problem"):
        rows["problem"] = calibration["problem"]
    if "sites" in calibration:
        rows["hidden states"] = f"{calibration['sites']}, feeding {calibration['projections']} projections"
    for label, value in rows.items():
        if value != "0 tokens":
            table.add_row(label, value)
    return table


def versions_text(versions: dict[str, str]) -> str:
    """Libraries in one line."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def export_facts(export: dict[str, Any]) -> PlainTable:
    """One TEAL checkpoint."""
    table = facts_table(f"TEAL checkpoint {export['name']}")
    table.add_row("allocation", export["allocation"])
    table.add_row("target sparsity", f"{export['target_sparsity']:.3f}")
    table.add_row("realised sparsity", _realised(export))
    table.add_row("thresholds", _thresholds_of(export))
    table.add_row("quantised", _quantisation(export))
    files = "file" if export["weight_files"] == 1 else "files"
    size = f"{export['weight_bytes'] / 1e6:,.1f} MB in {export['weight_files']} {files}"
    table.add_row("weights", export["problem"] or size)
    table.add_row("fingerprint", (export["weights"] or "not recorded")[:16])
    table.add_row("finished", export["finished"])
    return table


def _realised(export: dict[str, Any]) -> str:
    if export["realised_sparsity"] is None:
        return "not measured (teal eval)"
    return f"{export['realised_sparsity']:.3f} ({Path(export['realised_from']).name})"


def _thresholds_of(export: dict[str, Any]) -> str:
    known = {True: "recalibrated in the sparse network", False: "of the dense network", None: "not recorded"}
    return known[export["propagated"]]


def _quantisation(export: dict[str, Any]) -> str:
    scheme = export["quantization"]
    if scheme is None:
        return "no"
    return f"{scheme['projections']}" + (f", {scheme['output']} in 8 bits" if scheme["output"] else "")


def exports_table(exports: Sequence[dict[str, Any]]) -> PlainTable:
    """The checkpoints of a run, with the mean sparsity of each kind of projection in per cent.

    Target and realised sparsity share a column: with the output layer, a line is 80 characters.
    """
    kinds = list(dict.fromkeys(kind for export in exports for kind in export["mean_by_kind"]))
    table = PlainTable(
        "TEAL checkpoints; mean sparsity of each kind of projection, %", "", "target /\nrealised", *kinds
    )
    for export in exports:
        realised = export["realised_sparsity"]
        means = export["mean_by_kind"]
        table.add_row(
            export["name"],
            f"{export['target_sparsity']:.3f}" + ("" if realised is None else f" / {realised:.3f}"),
            *[_percent(means.get(kind)) for kind in kinds],
        )
    return table


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f}"


def projection_tables(projections: Sequence[_Projection]) -> list[PlainTable]:
    """Layers down, projections across: sparsity in per cent, target and realised; and thresholds."""
    measured = any(entry["realised"] is not None for entry in projections)

    def sparsity(entry: _Projection) -> str:
        return _percent(entry["sparsity"]) + (f" / {_percent(entry['realised'])}" if measured else "")

    def threshold(entry: _Projection) -> str:
        return f"{entry['threshold']:.3g}" if entry["sparsity"] != 0.0 else "dense"

    what = "Sparsity, %" + (": target / realised" if measured else " (target)")
    tables = [_by_place(what, projections, sparsity), _by_place("Thresholds on |x|", projections, threshold)]
    outside = [entry for entry in projections if entry["layer"] is None]
    if outside:
        table = PlainTable("Outside of the layers", "", what, "threshold")
        for entry in outside:
            table.add_row(entry["name"], sparsity(entry), threshold(entry))
        tables.append(table)
    return tables


def _by_place(title: str, projections: Sequence[_Projection], cell: Callable[[_Projection], str]) -> PlainTable:
    entries = {entry["name"]: entry for entry in projections}
    grid = grid_of(entries)
    table = PlainTable(title, "layer", *grid.kinds)
    for label, names in zip(grid.labels, grid.names, strict=True):
        table.add_row(label, *["" if name is None else cell(entries[name]) for name in names])
    return table


def results_table(results: Sequence[dict[str, Any]]) -> PlainTable:
    """The JSON results of a run."""
    table = PlainTable("Results", "result", "verb", "finished", "device", figures=False)
    for result in results:
        device = ", ".join(filter(None, (result["device"], result["dtype"])))
        table.add_row(Path(result["file"]).name, result["verb"], result["finished"], device)
    return table


def inspect_tables(result: dict[str, Any]) -> list[PlainTable]:
    """What `teal inspect` prints."""
    lines = facts_table(f"{result['kind']} {result['name']}")
    for label, text in result["summary"].items():
        lines.add_row(label, text)
    tables = [lines]
    if result["kind"] == "checkpoint":
        tables += [export_facts(result["exports"][0])]
    if result["calibration"] is not None:
        tables.append(calibration_facts(result["calibration"]))
    if result["kind"] == "checkpoint":
        tables += projection_tables(result["projections"])
    elif result["exports"]:
        tables.append(exports_table(result["exports"]))
    if result["results"]:
        tables.append(results_table(result["results"]))
    return tables
