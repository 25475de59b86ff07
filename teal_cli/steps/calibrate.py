"""Calibrate: text through the dense model, histograms of its hidden states out."""

import time
from pathlib import Path
from typing import Any

from torch import Tensor

from teal_cli.calibration import sensitivity
from teal_cli.calibration.block_error import GreedyPaths, measure_paths, require_one_row
from teal_cli.calibration.collect import collect
from teal_cli.checkpoint import calibration as calibration_file
from teal_cli.checkpoint.calibration import KEPT_TOKENS, Calibration, CalibrationInfo
from teal_cli.checkpoint.digests import configuration_digest
from teal_cli.config import CalibrateConfig, ImportConfig
from teal_cli.console import Reporter
from teal_cli.data import check_dataset, dataset_identity, token_blocks
from teal_cli.decode.recognition import recognise_
from teal_cli.errors import ArtefactError, UsageError, is_out_of_memory
from teal_cli.model_loading import load_model
from teal_cli.models.architectures import (
    Architecture,
    Projection,
    architecture_for,
    architecture_in,
    find_projections,
    table,
)
from teal_cli.models.discovery import propose
from teal_cli.models.forward import check_positions, table_of_positions
from teal_cli.models.loading import outline, pick_device, use_threads
from teal_cli.models.offload import computing_device, offload_, require_offload, spread_
from teal_cli.models.tokenizing import load_tokenizer
from teal_cli.models.weights import fingerprint, fingerprint_of, weight_files
from teal_cli.quantise.model import quantise_, quantised_layers
from teal_cli.quantise.published import published_codes
from teal_cli.quantise.storage import read_quantised, require_weights, write_quantised
from teal_cli.versions import library_versions
from teal_cli.workspace import Workspace
from teal_cli.writing import check_folder, require
from teal_kernels.packing import Packed


def calibrate(config: CalibrateConfig, reporter: Reporter, workspace: Workspace | None = None) -> Calibration:
    """Measure a model's hidden states and write the calibration to its run folder.

    Raises:
        TealError: anything wrong with model, text or machine.
    """
    use_threads(config.threads)
    check_dataset(config.dataset)
    workspace = workspace or Workspace.of(config, reporter)
    workspace.require_dense("calibrate")
    source = workspace.source
    # Whatever can fail cheaply fails before the model is loaded.
    require(check_folder, run_folder(config, workspace))
    model_type = str(source.config.get("model_type"))
    given = architecture_in(config.architecture, model_type)
    architecture = given or table().get(model_type) or _alike(workspace, reporter)
    if architecture is None:
        run = run_folder(config, workspace)
        raise propose(source.name, source.folder, run, device=config.device, dtype=config.dtype)
    if architecture.kind != "causal" and config.dataset == "self":
        raise UsageError(f"{source.name} is no decoder and writes no text: give another dataset (flag --dataset)")
    if config.greedy_tokens:
        require_one_row(architecture)
    empty = outline(source.folder, given)
    config = _within_positions(config, empty)
    device = pick_device(config.device)
    _require_possible(config, source.folder, empty)
    # An encoder has no prompt that runs dense: it drops inputs at its first positions too.
    sink_tokens = config.sink_tokens if architecture.kind == "causal" else 0
    tokenizer = load_tokenizer(source.folder)
    model = None
    if config.dataset == "self":
        model = load_model(source.folder, device=config.device, dtype=config.dtype, architecture=given)
        reporter.say(f"sampling {config.tokens:,} tokens from {source.name} itself")
    blocks = token_blocks(
        config.dataset,
        tokenizer,
        tokens=config.tokens,
        seq_len=config.seq_len,
        seed=config.seed,
        half="calibration",
        model=model,
    )
    say_if_short(reporter, config.dataset, blocks, config.tokens)
    if model is None:
        where = "cpu" if config.offload or config.device_map == "auto" else config.device
        model = load_model(source.folder, device=where, dtype=config.dtype, architecture=given)
    recognise_(model)
    if (reason := getattr(model, "teal_differs", None)) is not None:
        reporter.say(reason)
        raise propose(
            source.name, source.folder, run_folder(config, workspace), device=config.device, dtype=config.dtype
        )
    started = time.perf_counter()
    quantised = _first(blocks, config.quantise_tokens)
    packs = _quantised(config, source.folder, model, quantised, reporter)
    quantise_seconds = time.perf_counter() - started if packs else 0.0
    if config.offload:
        offload_(model, device)
    if config.device_map == "auto":
        spread_(model)
    projections = find_projections(model, output_layer=config.output_layer)
    started = time.perf_counter()
    with reporter.progress(f"calibrating on {config.dataset}", blocks.numel()) as advance:
        histograms = collect(
            model, projections, blocks.split(config.batch_size), sink_tokens=sink_tokens, on_batch=advance
        )
    seconds = time.perf_counter() - started
    started = time.perf_counter()
    sequences = _first(blocks, config.sensitivity_tokens)
    sensitivities = _sensitivities(model, projections, sequences, sink_tokens, reporter)
    sensitivity_seconds = time.perf_counter() - started
    started = time.perf_counter()
    walked = _first(blocks, config.greedy_tokens)
    greedy = _paths(config, model, projections, histograms, walked, reporter)
    info = CalibrationInfo(
        model=source.name,
        weights=fingerprint(source.folder),
        configuration=configuration_digest(source.folder),
        dataset=dataset_identity(config.dataset),
        tokens=blocks.numel(),
        seq_len=config.seq_len,
        sink_tokens=sink_tokens,
        seed=config.seed,
        dtype=str(model.dtype).removeprefix("torch."),
        device=computing_device(model).type,
        seconds=seconds,
        sensitivity_tokens=sequences.numel() if sensitivities else 0,
        sensitivity_seconds=sensitivity_seconds if sensitivities else 0.0,
        greedy_tokens=walked.numel(),
        greedy_inputs=config.greedy_inputs,
        greedy_seconds=time.perf_counter() - started if greedy.paths else 0.0,
        greedy_forwards=greedy.forwards,
        greedy_naive_forwards=greedy.naive_forwards,
        versions=library_versions(),
        quantization=config.quantisation,
        quantize_tokens=quantised.numel() if _chooses_codes(config, source.folder) else 0,
        quantize_seconds=quantise_seconds,
    )
    text = _first(blocks, KEPT_TOKENS) if config.dataset == "self" else None
    result = Calibration(info, projections, histograms, sensitivities, greedy.paths, text)
    run = run_folder(config, workspace)
    if packs:  # first: a calibration that is there has its weights
        result.quantised = calibration_file.quantised_file(run)
        write_quantised(weight_files(source.folder), packs, result.quantised, model)
        info.quantised_weights = fingerprint_of([result.quantised])
    calibration_file.save(result, run)
    return result


def _alike(workspace: Workspace, reporter: Reporter) -> Architecture | None:
    """The row that the blocks of a model of an unknown type fit by the names of their modules; None where none does."""
    source = workspace.source
    try:
        rows: dict[str, Architecture] = getattr(outline(source.folder), "teal_alike", {})
    except ArtefactError:  # which `propose` tells better
        return None
    if not rows:
        return None
    name, row = next(iter(rows.items()))
    kind = source.config.get("model_type")
    reporter.say(f"model type {kind} is not in the table of architectures: it is tried as one like {name}")
    return row


def _within_positions(config: CalibrateConfig, empty: Any) -> CalibrateConfig:
    """Sequences that a model's table of positions holds: shorter than is usual, where nobody said how long.

    Raises:
        UsageError: somebody did, and they are longer.
    """
    if "seq_len" in config.model_fields_set:
        check_positions(empty, config.seq_len)
        return config
    limit = table_of_positions(empty)
    return config if limit is None else config.model_copy(update={"seq_len": min(config.seq_len, limit)})


def _require_possible(config: CalibrateConfig, folder: Path, model: Any) -> None:
    """Refuse by a model's outline what it would otherwise fail at after hours."""
    find_projections(model, output_layer=config.output_layer)
    if config.quantise is not None:
        layers = quantised_layers(model, config.quantise, output_layer=config.quantise_output)
        require_weights(weight_files(folder), layers, model)
    if config.offload:
        require_offload(model)
    if config.device_map == "auto":
        require_offload(model, "device_map auto (flag --device-map)")


def _chooses_codes(config: CalibrateConfig, folder: Path) -> bool:
    """Whether GPTQ is to choose codes: for 4 bits, unless the model came with some."""
    scheme = config.quantise
    return scheme is not None and scheme.bits == 4 and published_codes(folder, scheme) is None


def _quantised(
    config: CalibrateConfig, folder: Path, model: Any, sequences: Tensor, reporter: Reporter
) -> dict[str, Packed]:
    """Quantise the model, as the configuration asks."""
    if config.quantise is None:
        return {}
    scheme = config.quantise
    codes, known = published_codes(folder, scheme), {}
    if codes is not None:
        reporter.say(f"taking the {scheme.text} codes that the model came with")
        known = read_quantised(codes, {p.name: scheme for p in find_projections(model)}, model.device)
    batches = sequences.split(config.batch_size) if len(sequences) and _chooses_codes(config, folder) else ()
    blocks = _block_count(model) if batches else 0
    with reporter.progress(f"quantising to {scheme.text}", blocks) as advance:
        return quantise_(
            model, scheme, output_layer=config.quantise_output, known=known, batches=batches, on_block=advance
        )


def _block_count(model: Any) -> int:
    return sum(len(model.get_submodule(path)) for path in architecture_for(model).blocks)


def say_if_short(reporter: Reporter, dataset: str, blocks: Tensor, tokens: int) -> None:
    """Say where a text has fewer tokens than were asked for, in whole sequences."""
    seq_len = blocks.shape[1]
    if blocks.numel() < tokens // seq_len * seq_len:
        reporter.say(
            f"{blocks.numel():,} tokens, not {tokens:,} (flag --tokens): the text of {dataset} fills "
            f"{len(blocks)} sequences of {seq_len}"
        )


def _first(blocks: Tensor, tokens: int) -> Tensor:
    """As many sequences as hold so many tokens, but no more than there are."""
    return blocks[: -(-tokens // blocks.shape[1])]


def _paths(
    config: CalibrateConfig,
    model: Any,
    projections: list[Projection],
    histograms: dict[str, Tensor],
    sequences: Tensor,
    reporter: Reporter,
) -> GreedyPaths:
    """What allocation greedy needs, from some sequences."""
    if len(sequences) == 0:
        return GreedyPaths()
    with reporter.progress("walking greedy paths", _block_count(model)) as advance:
        return measure_paths(
            model,
            projections,
            histograms,
            sequences,
            sink_tokens=config.sink_tokens,
            inputs=config.greedy_inputs,
            sparsity=config.greedy_sparsity,
            on_block=advance,
        )


def _sensitivities(
    model: Any, projections: list[Projection], sequences: Tensor, sink_tokens: int, reporter: Reporter
) -> dict[str, Tensor]:
    """Sensitivities from some sequences; none where memory does not allow a backward pass."""
    if len(sequences) == 0:
        return {}
    try:
        with reporter.progress("measuring sensitivities", sequences.numel()) as advance:
            return sensitivity.measure(
                model, projections, sequences.split(1), sink_tokens=sink_tokens, on_batch=advance
            )
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reporter.say(
            "no sensitivities: out of memory in the backward pass (a smaller seq_len needs less, flag --seq-len); "
            "allocation uniform works without them"
        )
        return {}


def run_folder(config: CalibrateConfig | ImportConfig, workspace: Workspace) -> Path:
    """Where this calibration is written."""
    return config.out or workspace.run
