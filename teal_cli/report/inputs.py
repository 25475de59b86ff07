"""What a report is made of: the artefacts of a run folder, and JSON results, read and checked."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from teal_cli.checkpoint import calibration as calibration_file
from teal_cli.checkpoint.adapted import Record, is_adapted, read_record
from teal_cli.checkpoint.calibration import Calibration
from teal_cli.checkpoint.export import read_summary
from teal_cli.checkpoint.fields import moment
from teal_cli.checkpoint.plan import SparsityPlan, carries_plan, check_is_whole
from teal_cli.checkpoint.results import Kind, kind_of_result, read_result
from teal_cli.config import STAGES
from teal_cli.errors import ArtefactError
from teal_cli.reading import read_json
from teal_cli.schemes import kind_of_weights


@dataclass(frozen=True)
class Result:
    """One JSON result."""

    file: Path
    kind: Kind
    content: dict[str, Any]

    @property
    def verb(self) -> str:
        """What made it."""
        return "eval" if self.kind == "encoder" else self.kind

    @property
    def runs(self) -> list[dict[str, Any]]:
        """Its runs; none for generate."""
        return list(self.content.get("runs", []))

    def by_weights(self) -> dict[str, list[dict[str, Any]]]:
        """Its runs by kind of weights, which is empty where they are not quantised."""
        found: dict[str, list[dict[str, Any]]] = {}
        for run in self.runs:
            found.setdefault(self.weights_of(run), []).append(run)
        return found

    def weights_of(self, run: dict[str, Any]) -> str:
        """The kind of weights of one of its runs; of older results that of all, or none."""
        return str(run.get("quantization", self.content.get("quantization", "")))

    def name_of(self, weights: str) -> str:
        """The model with this kind of weights, as its run folder is called."""
        return "-".join(filter(None, (self.content["model"], weights)))


@dataclass(frozen=True)
class Export:
    """A TEAL checkpoint."""

    folder: Path
    plan: SparsityPlan
    quantization: dict[str, str | None] | None
    """As its config.json has it, where its weights are quantised."""
    summary: dict[str, Any]
    """teal.json; empty where transformers saved the folder again."""

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.folder.resolve().name

    @property
    def weights(self) -> str:
        """Their kind, as results say it."""
        return kind_of_weights(self.quantization)

    @property
    def label(self) -> str:
        """Allocation and target, as tables say them."""
        return f"{self.plan.allocation}, {self.plan.target_sparsity:.2f}"


@dataclass(frozen=True)
class Adapted:
    """A model that `teal adapt` made."""

    name: str
    """Of its folder."""
    record: Record


@dataclass(frozen=True)
class Realised:
    """What was counted of one export while it was evaluated."""

    model_wide: float
    by_projection: dict[str, float]
    """Empty where the result leaves it out."""
    file: Path


@dataclass(frozen=True)
class Material:
    """Everything that a report may show; whatever is absent is empty."""

    folder: Path
    """The run folder or checkpoint that was asked for."""
    run: Path | None
    """The run folder; None for a checkpoint that lies in none."""
    calibration: Calibration | None
    exports: list[Export]
    focus: Export | None
    """The export that summaries are about."""
    results: list[Result]
    adapted: list[Adapted] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Of the folder."""
        return self.folder.name

    @property
    def is_checkpoint(self) -> bool:
        """Whether it is about one checkpoint, rather than a run."""
        return self.folder != self.run

    @property
    def model(self) -> str:
        """The model that was made sparse, as results name it."""
        if self.calibration is not None:
            return self.calibration.info.model
        for export in self.exports:
            if export.summary:
                return str(export.summary["calibration"]["model"])
        return str(self.results[0].content["model"]) if self.results else self.name

    @property
    def is_encoder(self) -> bool:
        """Whether an encoder was evaluated, which writes nothing that could be timed or shown."""
        return bool(self.of_kind("encoder"))

    def of_kind(self, *kinds: Kind) -> list[Result]:
        """The results of some kinds."""
        return [result for result in self.results if result.kind in kinds]

    def evaluated(self) -> Iterator[tuple[Result, dict[str, Any]]]:
        """Every run of every eval of a decoder."""
        return ((result, run) for result in self.of_kind("eval") for run in result.runs)

    def measured(self) -> Iterator[tuple[Result, dict[str, Any], dict[str, Any]]]:
        """Every run of every eval, and the part of it that says which plan was run."""
        for result in self.of_kind("eval", "encoder"):
            for run in result.runs:
                yield result, run, run["sparse"] if result.kind == "eval" else run

    def is_of(self, export: Export, result: Result, run: dict[str, Any]) -> bool:
        """Whether a run of a result is of an export's model and kind of weights."""
        named = (result.content["model"], result.weights_of(run))
        # One that was measured by its own name is quantised without a flag that says so.
        return named in ((self.model, export.weights), (export.name, export.weights), (export.name, ""))

    def evals_of(self, export: Export) -> Iterator[tuple[Result, dict[str, Any], dict[str, Any]]]:
        """What is measured of an export: its model, its weights, its plan."""
        own = (export.plan.allocation, export.plan.target_sparsity)
        for result, run, plan in self.measured():
            if self.is_of(export, result, run) and own == (plan["allocation"], plan["target_sparsity"]):
                yield result, run, plan

    def realised(self, export: Export) -> Realised | None:
        """What the first eval of an export counted."""
        for result, run, plan in self.evals_of(export):
            return Realised(plan["realised_sparsity"], run.get("realised_by_projection", {}), result.file)
        return None


def when(file: Path, content: dict[str, Any]) -> str:
    """When an artefact was made, to the minute: as it says itself, else the date of its file."""
    stated = content.get("finished")
    time = moment(stated) if stated else datetime.fromtimestamp(file.stat().st_mtime, UTC)
    return f"{time:%Y-%m-%d %H:%M} UTC"


def read_export(folder: Path) -> Export:
    """A TEAL checkpoint's plan and what it was made from.

    Raises:
        ArtefactError: no TEAL checkpoint, or a damaged one.
    """
    config = read_json(folder / "config.json", "model configuration")
    check_is_whole(folder, config)
    if not carries_plan(config):
        raise ArtefactError(f"{folder} is no TEAL checkpoint: its config.json carries no thresholds")
    content = config["quantization_config"]
    summary = read_summary(folder) if (folder / "teal.json").is_file() else {}
    return Export(folder, SparsityPlan.from_dict(content), content.get("quantization"), summary)


def read_material(
    folder: Path, further: Sequence[Path] = (), say: Callable[[str], None] = lambda message: None
) -> Material:
    """Everything of a run folder, or of one checkpoint and the run folder that it lies in.

    Args:
        folder: RUN, or a TEAL checkpoint.
        further: JSON results from elsewhere.
        say: told which files of the run folder are left out, and why.

    Raises:
        ArtefactError: neither a run folder nor a checkpoint, or something in it is damaged.
    """
    if not folder.is_dir():
        raise ArtefactError(f"there is no folder {folder}: give a run folder, such as runs/smollm2-135m")
    folder = folder if folder.name not in ("", "..") else folder.resolve()
    own = read_export(folder) if _is_checkpoint(folder) else None
    parent = folder.parent if own is not None else folder
    calibration = calibration_file.load(parent) if calibration_file.exists(parent) else None
    # A checkpoint may lie anywhere; what lies beside it there is not its run's.
    run = parent if own is None or calibration is not None else None
    exports = [own] if own is not None else [read_export(each) for each in _checkpoints(folder)]
    results = list(_results_in(run, say)) if run is not None else []
    adapted = [Adapted(each.resolve().name, read_record(each)) for each in _adapted(folder, own is not None)]
    if calibration is None and not exports and not results and not adapted:
        raise ArtefactError(f"{folder} is neither a run folder nor a TEAL checkpoint: run `teal calibrate` first")
    for file in further:
        result = _result_of(file, read_result(file))
        if result is None:
            raise ArtefactError(f"{file} is no result of teal eval, bench or generate: make one with --json")
        results += [result] if all(result.content != known.content for known in results) else []
    found = Material(folder, run, calibration, exports, own, results, adapted)
    return found if own is not None else replace(found, focus=_focus(found))


def _is_checkpoint(folder: Path) -> bool:
    file = folder / "config.json"
    if not file.is_file():
        return False
    config = read_json(file, "model configuration")
    check_is_whole(folder, config)
    return carries_plan(config)


def _checkpoints(run: Path) -> Iterator[Path]:
    return (each for each in _folders(run) if _is_checkpoint(each))


def _folders(run: Path) -> Iterator[Path]:
    return (each for each in sorted(run.iterdir()) if each.is_dir() and not each.name.startswith("."))


def _adapted(folder: Path, is_checkpoint: bool) -> Iterator[Path]:
    """The adapted models of a run folder; of a checkpoint, itself."""
    return (each for each in ([folder] if is_checkpoint else _folders(folder)) if is_adapted(each))


def _results_in(run: Path, say: Callable[[str], None]) -> Iterator[Result]:
    """Stage results first, in the order of the stages, then whatever else --json wrote here."""
    stages = [run / f"{stage}.json" for stage in STAGES]
    others = [file for file in sorted(run.glob("*.json")) if file not in stages]
    for file in [*filter(Path.is_file, stages), *others]:
        try:
            result = _result_of(file, read_result(file))
        except ArtefactError as error:
            if file in stages:
                raise
            say(f"left out: {error}")
            continue
        if result is not None:
            yield result
        elif file in stages and file.stem not in ("calibrate", "adapt", "export"):
            say(f"left out: {file} is no result of teal {file.stem}")


def _result_of(file: Path, content: dict[str, Any]) -> Result | None:
    """The result in a file; None of other files."""
    kind = kind_of_result(content, file)
    return None if kind is None else Result(file, kind, content)


def _focus(material: Material) -> Export | None:
    """The export of the recipe; where there was none, the one nearest to half, evaluated before others."""
    stage = material.run / "export.json" if material.run is not None else None
    if stage is not None and stage.is_file():
        made = Path(str(read_result(stage).get("folder", ""))).name
        for export in material.exports:
            if export.name == made:
                return export

    def rank(export: Export) -> tuple[float, bool, str]:
        evaluated = any(material.evals_of(export))
        return abs(export.plan.target_sparsity - 0.5), not evaluated, export.name

    return min(material.exports, key=rank, default=None)
