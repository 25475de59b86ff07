"""Run: the chain of a recipe, stage after stage; finished stages are kept and skipped next time."""

import hashlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from teal_cli.atomic import file_digest, write_json
from teal_cli.checkpoint import calibration as calibration_file
from teal_cli.checkpoint.adapted import Record, read_record
from teal_cli.checkpoint.digests import configuration_digest
from teal_cli.checkpoint.export import check_checkpoint
from teal_cli.checkpoint.results import check_stage, read_result
from teal_cli.config import (
    AdaptConfig,
    BenchConfig,
    CalibrateConfig,
    EvalConfig,
    ExportConfig,
    GenerateConfig,
    RunConfig,
    SharedConfig,
)
from teal_cli.console import Reporter
from teal_cli.data import check_dataset
from teal_cli.errors import ArtefactError, UsageError
from teal_cli.model_source import ModelSource
from teal_cli.models.companions import companion_files
from teal_cli.models.loading import threads_restored
from teal_cli.models.weights import fingerprint
from teal_cli.reading import read_json
from teal_cli.steps.adapt import adapt
from teal_cli.steps.bench import bench
from teal_cli.steps.calibrate import calibrate, run_folder
from teal_cli.steps.evaluate import check_inputs, evaluate
from teal_cli.steps.export import export
from teal_cli.steps.generate import Generator
from teal_cli.steps.positions import require_fit
from teal_cli.text_files import TextFile
from teal_cli.version import __version__
from teal_cli.versions import now
from teal_cli.workspace import Workspace
from teal_cli.writing import check_folder, require

_STATE = "run.json"


def run_recipe(recipe: RunConfig, reporter: Reporter) -> dict[str, dict[str, Any]]:
    """Run the stages that are not done yet.

    A stage is done when RUN/run.json says that it finished with this very configuration, after the
    same earlier stages, on the same weights, and its artefact is still whole.

    Returns:
        stage -> its result as JSON, of finished stages too.

    Raises:
        TealError: from a stage; the ones before it are kept.
    """
    _check(recipe)
    workspace = Workspace.of(next(iter(recipe.stages.values())), reporter)
    require(check_folder, workspace.run)
    path = workspace.run / _STATE
    for file in (path, *(workspace.run / f"{stage}.json" for stage in recipe.stages)):
        if file.is_dir():
            raise ArtefactError(f"{file} is a folder where a result is to be written: take it away")
    state = _state(path, reporter)
    keys = _keys(recipe, workspace)
    done = {
        stage
        for stage, config in recipe.stages.items()
        if state.get(stage) == keys[stage] and _whole(stage, config, workspace, workspace.run / f"{stage}.json")
    }
    for stage, config in recipe.stages.items():
        if stage not in done:
            _check_inputs(config)
            require_fit(config, workspace)
    results: dict[str, dict[str, Any]] = {}
    measured = workspace
    for number, (stage, config) in enumerate(recipe.stages.items(), start=1):
        title = f"[{number}/{len(recipe.stages)}] {stage}"
        result_file = workspace.run / f"{stage}.json"
        if stage in done:
            reporter.say(f"{title}: done before, kept")
            results[stage] = read_result(result_file)
            measured = _adapted(workspace, results[stage]) if stage == "adapt" else measured
            continue
        reporter.say(title)
        used = config if measured is workspace else _of_adapted(config, measured)
        with threads_restored():  # each stage has its own
            results[stage] = _stated(config, _run_stage(used, reporter, measured, result_file))
        measured = _adapted(workspace, results[stage]) if stage == "adapt" else measured
        write_json(result_file, results[stage])
        # run.json is written when the stage is done, so a stage that is cut short runs again.
        state[stage] = keys[stage]
        write_json(path, state)
        if config.json_file is not None:
            write_json(config.json_file, results[stage])
    reporter.say(f"all of it lies in {workspace.run}; next, for one page with plots: teal report {workspace.run}")
    return results


def _adapted(workspace: Workspace, result: dict[str, Any]) -> Workspace:
    """The workspace of what stage adapt wrote, for the stages after it."""
    folder = Path(result["folder"])
    return replace(workspace, source=ModelSource(folder.name, folder))


def _of_adapted(config: SharedConfig, workspace: Workspace) -> SharedConfig:
    """A stage's configuration, for a model that has its own thresholds: it keeps what is not about these."""
    own = {"sparsity", "calibration", "allocation", "limits", "cost", "recalibrate"}
    given = {key: getattr(config, key) for key in config.model_fields_set - own}
    return type(config)(**{**given, "model": str(workspace.source.folder)})


def _check(recipe: RunConfig) -> None:
    """Contradictions that only a chain can have."""
    generate = recipe.stages.get("generate")
    if isinstance(generate, GenerateConfig) and generate.prompt in (None, "-"):
        raise UsageError("the recipe's generate stage needs a prompt (key prompt): teal run does not ask for one")


def _keys(recipe: RunConfig, workspace: Workspace) -> dict[str, str]:
    """Of each stage what its result depends on; it covers the stages before: a changed calibration runs all again."""
    folder = workspace.source.folder
    read = [file_digest(file) for file in companion_files(folder, with_index=False)]  # by the tokenizer, mostly
    keys, key = {}, "|".join([fingerprint(folder), configuration_digest(folder), *read])
    for stage, config in recipe.stages.items():
        key = keys[stage] = hashlib.sha256(f"{key}|{stage}|{_settings(config)}".encode()).hexdigest()
    return keys


def _check_inputs(config: SharedConfig) -> None:
    """Fail before the first stage runs where a later one would miss its text, a package or a task."""
    if isinstance(config, CalibrateConfig):
        check_dataset(config.dataset)
    if isinstance(config, AdaptConfig):
        for dataset in config.dataset:
            check_dataset(dataset)
    if isinstance(config, EvalConfig):
        check_inputs(config)


def _settings(config: SharedConfig) -> str:
    """What the result depends on: the configuration, the text of its files, and this teal."""
    said = [str(getattr(config, key, None)) for key in ("dataset", "text")]
    named = [TextFile.named(text) for text in (config.dataset if isinstance(config, AdaptConfig) else said)]
    texts = [file.path for file in named if file is not None]
    texts += [Path(str(getattr(config, key, None))) for key in ("allocation", "cost", "architecture")]
    digests = [file_digest(path) for path in texts if path.is_file()]
    return "|".join([config.model_dump_json(exclude={"json_file", "quiet"}), *digests, __version__])


def _state(path: Path, reporter: Reporter) -> dict[str, Any]:
    """Which stages are done: none where nobody can read it, and they are run again."""
    if not path.exists():
        return {}
    try:
        return read_json(path, "run state")
    except ArtefactError as error:
        reporter.say(f"{error}; running all stages")
        return {}


def _whole(stage: str, config: SharedConfig, workspace: Workspace, result_file: Path) -> bool:
    """Whether a finished stage's artefacts are still there, and what they were."""
    try:
        result = read_result(result_file)
        check_stage(stage, result, result_file)
        if isinstance(config, CalibrateConfig):
            calibration_file.check_quantised(calibration_file.load(run_folder(config, workspace)))
        if isinstance(config, AdaptConfig):
            return _is_of(read_record(Path(result["folder"])), result)
        if isinstance(config, ExportConfig):
            check_checkpoint(Path(result["folder"]))
    except (ArtefactError, OSError):
        return False
    return True


def _is_of(record: Record, result: dict[str, Any]) -> bool:
    """Whether an adapted model is the one that a stage made, and no later one in its place."""
    content = record.model_dump(mode="json", exclude={"finished"})  # a stage has its own
    return all(result.get(key) == value for key, value in content.items())


def _stated(config: SharedConfig, result: dict[str, Any]) -> dict[str, Any]:
    """A stage's result with what it was made by, and when."""
    return {"config": config.settings(), **result, "finished": now()}


def _run_stage(config: SharedConfig, reporter: Reporter, workspace: Workspace, result_file: Path) -> dict[str, Any]:
    """One stage's result, as JSON; of an evaluation that ends early what it had goes to the file."""
    match config:
        case CalibrateConfig():
            return calibration_summary(calibrate(config, reporter, workspace))
        case AdaptConfig():
            return adapt(config, reporter, workspace).to_json()
        case ExportConfig():
            return asdict(export(config, reporter, workspace))
        case EvalConfig():
            return evaluate(
                config,
                reporter,
                workspace,
                keep=lambda found: write_json(result_file, _stated(config, found.to_json())),
            ).to_json()
        case BenchConfig():
            return bench(config, reporter, workspace).to_json()
        case GenerateConfig():
            generator = Generator(config, reporter, workspace)
            prompt = config.prompt or ""
            reply = generator.reply([{"role": "user", "content": prompt}])
            if reply.interrupted:
                raise KeyboardInterrupt
            return generator.to_json(prompt, reply)
    raise UsageError(f"teal run cannot run {type(config).__name__}")


def calibration_summary(calibration: calibration_file.Calibration) -> dict[str, Any]:
    """What `teal calibrate --json` writes."""
    return {
        **asdict(calibration.info),
        "sites": len(calibration.histograms),
        "projections": len(calibration.projections),
    }
