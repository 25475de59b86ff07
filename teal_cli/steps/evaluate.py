"""Evaluate: a sparse model on text that it was not calibrated on, beside its dense self."""

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from teal_cli.checkpoint.export import read_summary
from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.config import EvalConfig
from teal_cli.config_values import is_allocation_file
from teal_cli.console import Reporter
from teal_cli.data import Half, check_dataset, dataset_identity, recorded_datasets, token_blocks
from teal_cli.decode.engine import Engine
from teal_cli.errors import ArtefactError, UsageError
from teal_cli.evaluation.generation import Agreement, agree
from teal_cli.evaluation.perplexity import compare
from teal_cli.evaluation.results import EncoderResult, EncoderRun, EvalResult, EvalRun, Scores
from teal_cli.evaluation.samples import KEPT, sample_of
from teal_cli.evaluation.similarity import compare_states
from teal_cli.evaluation.tasks import open_tasks, run_tasks
from teal_cli.model_loading import load_dense, load_model, ranks_for
from teal_cli.model_source import ModelSource
from teal_cli.models.loading import use_threads
from teal_cli.models.tokenizing import load_tokenizer
from teal_cli.planning import allocate, allocations
from teal_cli.sparse import apply_plan_, control_of, neuron_sparsity, sparsify_, use_backend
from teal_cli.sparse.weight_bytes import weight_bytes_per_token
from teal_cli.steps.artefacts import calibration_for, checkpoint_for, with_other_weights
from teal_cli.steps.calibrate import say_if_short
from teal_cli.steps.original import original_of
from teal_cli.steps.positions import require_fit
from teal_cli.text_files import TextFile
from teal_cli.versions import device_description, library_versions
from teal_cli.workspace import Workspace
from teal_kernels.packing import Packed


def evaluate(
    config: EvalConfig,
    reporter: Reporter,
    workspace: Workspace | None = None,
    *,
    keep: Callable[[EvalResult], None] = lambda result: None,
) -> EvalResult | EncoderResult:
    """Perplexity, drift and realised sparsity on held-out text; continuations and harness tasks where asked.

    Of an encoder, how near its hidden states stay. With `also_quantise`, the same once more for each.

    Args:
        config: what to measure.
        reporter: told what goes on.
        workspace: of the model, if it is there already.
        keep: called with the figures that are finished, if what comes after them fails or is interrupted.

    Raises:
        TealError: anything wrong with model, text or machine.
    """
    use_threads(config.threads)
    harness = check_inputs(config)
    dataset = config.named_text
    workspace = workspace or Workspace.of(config, reporter)
    require_fit(config, workspace)
    others = with_other_weights(config, workspace, reporter)
    # All kinds of weights read one text, which none was calibrated on.
    halves = [_half(dataset, _calibrated_on(*each, reporter)) for each in ((config, workspace), *others)]
    half: Half = "evaluation" if "evaluation" in halves else "all"
    had: list[EvalResult | EncoderResult] = []
    before: EvalResult | None = None
    finished = False
    try:
        for its_config, its_workspace in ((config, workspace), *others):
            gc.collect()  # a GPU has no room for the model before it
            for found in _evaluate(its_config, dataset, half, reporter, its_workspace, harness):
                had.append(before.beside(found) if before and isinstance(found, EvalResult) else found)
            before = had[-1] if isinstance(had[-1], EvalResult) else None
        finished = True
    finally:
        if not finished and had and isinstance(had[-1], EvalResult):
            keep(had[-1])
    return had[-1]


def check_inputs(config: EvalConfig) -> Any:
    """Fail before the model is looked for, and calibrated, say, where text, packages or tasks are missing.

    Returns:
        What `open_tasks` returns; None without tasks.

    Raises:
        TealError: one of them is.
    """
    if config.text is not None and TextFile.named(config.named_text) is None:
        raise ArtefactError(f"text file {config.text} must be a .txt or .jsonl file")
    check_dataset(config.named_text)
    return open_tasks(config.tasks, config.task_path) if config.tasks else None


def _evaluate(
    config: EvalConfig, dataset: str, half: Half, reporter: Reporter, workspace: Workspace, harness: Any
) -> Iterator[EvalResult | EncoderResult]:
    """Results of one kind of weights: the same figures again and again, and further ones as they are had."""
    kind = workspace.kind(config)
    prefixes = config.prefixes if kind == "causal" else [0]
    if kind != "causal":
        _check_no_decoder(config, workspace, reporter)
    tokenizer = load_tokenizer(workspace.source.folder)

    def text(model: Any = None) -> Tensor:
        return token_blocks(
            dataset,
            tokenizer,
            tokens=config.tokens,
            seq_len=config.seq_len,
            seed=config.seed,
            half=half,
            model=model,
        )

    # Text comes before the model: a missing file should not cost a load.
    blocks = None if dataset == "self" else text()
    model, plans, packs = _model_and_plans(config, workspace, reporter)
    original, its_name = _original(config, workspace, reporter)
    if config.generate:
        Engine(model).check_length(config.prompt_tokens, config.new_tokens)
    quantization = config.quantisation or workspace.source.quantisation
    control = control_of(model)
    use_backend(control, config.backend, model.device, model.dtype)
    if blocks is None:
        with control.switched_off():
            blocks = text(model)
    _say_what_there_is(config, dataset, blocks, reporter)
    machine: dict[str, Any] = {
        "device": device_description(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "seed": config.seed,
        "versions": library_versions(),
    }
    if kind == "encoder":
        with reporter.progress(f"evaluating on {dataset}", blocks.numel()) as advance:
            found = compare_states(model, plans, blocks, on_sequence=advance)
        runs = [EncoderRun(p.allocation, p.target_sparsity, entry) for p, entry in zip(plans, found, strict=True)]
        yield EncoderResult(workspace.source.name, dataset, half, config.seq_len, quantization, runs, **machine)
        return
    with reporter.progress(f"evaluating on {dataset}", blocks.numel()) as advance:
        compared = compare(model, plans, blocks, dense_prefixes=prefixes, on_sequence=advance, dense=original)
    written: list[Agreement] | list[None] = [None] * len(plans)
    tasks: list[Scores] = [{} for _ in plans]

    def result() -> EvalResult:
        return EvalResult(
            model=workspace.source.name,
            dataset=dataset,
            half=half,
            seq_len=config.seq_len,
            mode=config.mode,
            compared_with=its_name,
            runs=[
                EvalRun(
                    quantization=quantization,
                    allocation=plan.allocation,
                    target_sparsity=plan.target_sparsity,
                    dense_prefix=prefix,
                    comparison=comparison,
                    bytes_per_token=weight_bytes_per_token(model, comparison.realised_by_projection, packs),
                    dense_bytes_per_token=weight_bytes_per_token(model if original is None else original, {}, packs),
                    neuron_sparsity=neuron_sparsity(model, comparison.realised_by_projection)
                    if config.mode == "intrinsic"
                    else None,
                    generation=generation,
                    samples=[sample_of(tokenizer, each) for each in generation.continuations[:KEPT]]
                    if generation
                    else [],
                    tasks=dict(scores),
                )
                for plan, of_plan, generation, scores in zip(plans, compared, written, tasks, strict=True)
                for prefix, comparison in zip(prefixes, of_plan, strict=True)
            ],
            **machine,
        )

    yield result()
    if config.generate:
        prompts = blocks[: config.prompts, : config.prompt_tokens]
        total = (len(plans) + 1) * len(prompts) * config.new_tokens
        with reporter.progress("writing", total) as advance:
            written = agree(model, plans, prompts, new_tokens=config.new_tokens, on_tokens=advance, dense=original)
        yield result()
    if config.tasks:
        reporter.say(f"tasks: {', '.join(config.tasks)}, dense and sparse")
    for scores, plan in zip(tasks, plans, strict=True) if config.tasks else ():
        apply_plan_(model, plan)
        limit, seed = config.task_limit, config.seed
        scores |= run_tasks(model, tokenizer, control, config.tasks, harness, limit=limit, seed=seed, dense=original)
        yield result()


def _original(config: EvalConfig, workspace: Workspace, reporter: Reporter) -> tuple[Any, str]:
    """The dense model that an adapted one came from, and its name; None and its own name of others."""
    found = original_of(workspace.source.folder, reporter)
    if found is None:
        return None, workspace.source.name
    source, folder = found
    reporter.say(f"comparing with {source.name}, from which this was adapted")
    return load_model(folder, device=config.device, dtype=config.dtype, ranks=ranks_for(config)), source.name


def _say_what_there_is(config: EvalConfig, dataset: str, blocks: Tensor, reporter: Reporter) -> None:
    """Where the text is shorter than what was asked for."""
    say_if_short(reporter, dataset, blocks, config.tokens)
    if config.generate and len(blocks) < config.prompts:
        reporter.say(
            f"{len(blocks)} prompts, not {config.prompts} (flag --prompts): the text was read as {len(blocks)} "
            "sequences, and each gives one; more --tokens or a smaller --seq-len give more"
        )


def _check_no_decoder(config: EvalConfig, workspace: Workspace, reporter: Reporter) -> None:
    """What asks for a decoder, of an encoder or encoder-decoder.

    Raises:
        UsageError: something does that has no meaning.
    """
    name = workspace.source.name
    for key in ("generate", "tasks"):
        if getattr(config, key):
            raise UsageError(f"{key} (flag --{key}) is for decoders, and {name} is none")
    if config.dataset == "self":
        raise UsageError(f"{name} is no decoder and writes no text: give another dataset (flag --dataset)")
    if "dense_prefix" in config.model_fields_set:
        reporter.say(f"dense_prefix has no meaning for {name}: an encoder has no prompt, all positions drop inputs")


def _model_and_plans(
    config: EvalConfig, workspace: Workspace, reporter: Reporter
) -> tuple[Any, list[SparsityPlan], dict[str, Packed]]:
    """The model, loaded once, and the plan of every allocation at every sparsity, exported where need be.

    And what its weights stand for, where they are quantised.
    """
    source = workspace.source
    if config.mode == "intrinsic":
        model, plan = workspace.load_intrinsic(config, "eval")
        return model, [plan], {}
    if source.is_teal_checkpoint:
        if len(config.sparsity or []) > 1:
            raise UsageError(f"{source.folder} has one sparsity: name the dense model to compare several")
        folder = checkpoint_for(config, config.sparsity[0] if config.sparsity else None, workspace, reporter)
        ranks = ranks_for(config)
        return load_model(folder, device=config.device, dtype=config.dtype, ranks=ranks), [source.plan], {}
    calibration = calibration_for(config, workspace, reporter)
    wanted = [
        (allocation, sparsity)
        for allocation in allocations(config, calibration, reporter)
        for sparsity in _targets(config, allocation)
    ]
    # Whatever an allocation refuses, it refuses before the model is loaded.
    first, *_ = [allocate(config, calibration, sparsity, allocation) for allocation, sparsity in wanted]
    model, packs = load_dense(source.folder, config, calibration, ranks_for(config))
    sparsify_(model, first)
    plans = []
    for allocation, sparsity in wanted:
        folder = checkpoint_for(config, sparsity, workspace, reporter, allocation=allocation, model=model)
        plans.append(ModelSource(source.name, folder).plan)
    return model, plans, packs


def _targets(config: EvalConfig, allocation: str) -> Sequence[float | None]:
    """The sparsities of one allocation; a file has its own, which must agree with a single one that was asked for."""
    if is_allocation_file(allocation) and (config.sparsity is None or len(config.allocations) > 1):
        return [None]
    return config.sparsity or [None]


def _calibrated_on(config: EvalConfig, workspace: Workspace, reporter: Reporter) -> str:
    """The dataset that the thresholds come from; empty where the folder does not say, or nothing was calibrated."""
    if config.mode == "intrinsic":
        return ""
    if not workspace.source.is_teal_checkpoint:
        return calibration_for(config, workspace, reporter).info.dataset
    try:
        return str(read_summary(workspace.source.folder).get("calibration", {}).get("dataset", ""))
    except ArtefactError:  # saved again by transformers, which keeps no teal.json
        return ""


def _half(dataset: str, calibrated_on: str) -> Half:
    """Held-out text: the other half of what calibration read, or all of another dataset."""
    if not calibrated_on:  # nobody knows: be careful
        return "evaluation"
    return "evaluation" if dataset_identity(dataset) in (calibrated_on, *recorded_datasets(calibrated_on)) else "all"
