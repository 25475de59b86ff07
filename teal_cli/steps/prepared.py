"""Models made ready to be timed: real ones with their plans, or of random weights with thresholds of their own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from teal_cli.bench.decode import random_prompt, text_prompt
from teal_cli.calibration import sensitivity
from teal_cli.calibration.collect import collect
from teal_cli.checkpoint.calibration import Calibration, CalibrationInfo
from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.config import BenchConfig
from teal_cli.config_values import is_allocation_file
from teal_cli.console import Reporter
from teal_cli.errors import UsageError
from teal_cli.model_loading import load_dense, load_model, ranks_for
from teal_cli.model_source import ModelSource
from teal_cli.models.aliases import require_alias
from teal_cli.models.architectures import (
    architecture_of,
    find_projections,
)
from teal_cli.models.loading import build_random_model
from teal_cli.models.tokenizing import load_tokenizer
from teal_cli.planning import allocate, allocations
from teal_cli.quantise.model import pack_, quantise_
from teal_cli.shard_loading import build_random_shard
from teal_cli.sparse import (
    make_intrinsic_,
    recalibrate_,
    sparsify_,
)
from teal_cli.steps.artefacts import calibration_for, checkpoint_for, require_own_plan
from teal_cli.steps.bench_speculation import encoded_prompts
from teal_cli.steps.positions import require_fit
from teal_cli.workspace import Workspace

_RANDOM_SEQUENCES, _RANDOM_SEQ_LEN, _SINK_TOKENS = 4, 128, 4


@dataclass(frozen=True)
class Prepared:
    """A model to time."""

    name: str
    quantization: str
    """Of its weights, as `ModelConfig.quantisation`; empty where they are not."""
    model: Any
    plans: Sequence[SparsityPlan]
    prompt: Tensor
    """(batch, tokens) int64."""
    prompts: Mapping[str, Tensor] = field(default_factory=dict)
    """Kind -> (1, tokens) int64, for replies from drafts."""


def prepare(config: BenchConfig, reporter: Reporter, workspace: Workspace | None = None) -> Prepared:
    """Load or build the model, and make its plans."""
    return _random(config, reporter) if config.random_weights else _real(config, reporter, workspace)


def wanted(config: BenchConfig) -> list[float]:
    """Sparsities to measure; 0 is the dense run, which is always there."""
    return sorted({value for value in config.sparsity if value > 0})


def _real(config: BenchConfig, reporter: Reporter, workspace: Workspace | None) -> Prepared:
    workspace = workspace or Workspace.of(config, reporter)
    source = workspace.source
    workspace.require_decoder(config, "bench")
    require_fit(config, workspace)
    tokenizer = load_tokenizer(source.folder)
    prompt = text_prompt(tokenizer, config.prompt_tokens, config.seed, config.batch)
    prompts = encoded_prompts(tokenizer) if config.speculate else {}
    if config.mode == "intrinsic":
        model, plan = workspace.load_intrinsic(config, "bench")
        return Prepared(source.name, "", model, [plan], prompt)
    if source.is_teal_checkpoint:
        require_own_plan(config, source)
        plan = source.plan
        if "sparsity" in config.model_fields_set and wanted(config) != [plan.target_sparsity]:
            raise UsageError(
                f"{source.folder} was exported at sparsity {plan.target_sparsity}: name the dense model to bench others"
            )
        model = load_model(source.folder, device=config.device, dtype=config.dtype, ranks=ranks_for(config))
        return Prepared(source.name, source.quantisation, model, [plan], prompt, prompts)
    calibration = calibration_for(config, workspace, reporter)
    (allocation,) = allocations(config, calibration, reporter)
    targets = [None] if is_allocation_file(allocation) else wanted(config)
    first = allocate(config, calibration, 0.0, "uniform")  # for the model, until it has a plan
    model, packs = load_dense(source.folder, config, calibration, ranks_for(config))
    sparsify_(model, first)
    plans = []
    for target in targets:
        folder = checkpoint_for(config, target, workspace, reporter, allocation=allocation, model=model)
        plans.append(ModelSource(source.name, folder).plan)
    pack_(model, packs)
    return Prepared(source.name, config.quantisation, model, plans, prompt, prompts)


def _random(config: BenchConfig, reporter: Reporter) -> Prepared:
    """A model of an alias's shape with random weights."""
    alias = require_alias(config.model)
    if architecture_of(str(alias.shape["model_type"])).kind != "causal":
        raise UsageError(f"random weights (flag --random-weights) are for decoders, and {alias.name} is none")
    reporter.say(f"building {alias.name} with random weights")
    if (ranks := ranks_for(config)) is not None:
        group = config.quantise.group if config.quantise is not None else 0
        model = build_random_shard(alias, ranks, dtype=config.dtype, seed=config.seed, group=group)
    else:
        model = build_random_model(alias, device=config.device, dtype=config.dtype, seed=config.seed)
    return prepare_random(config, alias.name, model)


def prepare_random(config: BenchConfig, shape: str, model: Any) -> Prepared:
    """Plans for a model with random weights, of thresholds that are measured on them.

    Args:
        config: of bench.
        shape: what the model is called.
        model: dense, as `build_random_model` makes it; changed in place.
    """
    vocabulary = int(model.config.get_text_config().vocab_size)
    name = f"{shape} (random weights)"
    prompt = random_prompt(vocabulary, config.prompt_tokens, config.seed, config.batch)
    if config.mode == "intrinsic":
        return Prepared(name, "", model, [make_intrinsic_(model)], prompt)
    packs = {}
    if config.quantise is not None:
        packs = quantise_(model, config.quantise, output_layer=config.quantise_output)
    # There is nothing to be sensitive to in random weights: uniform, unless another was asked for.
    allocation = config.allocation if "allocation" in config.model_fields_set else "uniform"
    projections = find_projections(model, output_layer=None)
    text = random_prompt(vocabulary, _RANDOM_SEQ_LEN, config.seed + 1, _RANDOM_SEQUENCES)
    sequences = text.split(1)
    sensitivities = {}
    if allocation.startswith("fisher"):
        sensitivities = sensitivity.measure(model, projections, sequences, sink_tokens=_SINK_TOKENS)
    calibration = Calibration(
        CalibrationInfo(
            model=shape,
            weights=f"random, seed {config.seed}",
            dataset="random tokens",
            tokens=_RANDOM_SEQUENCES * _RANDOM_SEQ_LEN,
            seq_len=_RANDOM_SEQ_LEN,
            sink_tokens=_SINK_TOKENS,
            seed=config.seed,
            dtype=str(model.dtype).removeprefix("torch."),
            device=model.device.type,
            seconds=0.0,
        ),
        projections,
        collect(model, projections, sequences, sink_tokens=_SINK_TOKENS),
        sensitivities,
    )
    plans = [allocate(config, calibration, value, allocation) for value in wanted(config)]
    sparsify_(model, allocate(config, calibration, 0.0, "uniform"))
    if config.recalibrate:
        plans = [recalibrate_(model, plan, text, dense_prefix=_RANDOM_SEQ_LEN // 2) for plan in plans]
    pack_(model, packs)
    return Prepared(name, config.quantisation, model, plans, prompt)
