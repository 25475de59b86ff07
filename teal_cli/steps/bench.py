"""Bench: how fast a model decodes, dense and at several sparsities."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from teal_cli.allocation import make_plan
from teal_cli.bench.decode import DecodeRun, bench_decode, random_prompt, text_prompt
from teal_cli.bench.kernels import KernelRun, bench_kernels
from teal_cli.calibration.collect import collect
from teal_cli.checkpoint.calibration import Calibration, CalibrationInfo
from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.config import BenchConfig
from teal_cli.decode.engine import Engine
from teal_cli.errors import UsageError
from teal_cli.models.aliases import require_alias
from teal_cli.models.architectures import find_projections
from teal_cli.models.loading import build_random_model, load_model, load_tokenizer
from teal_cli.report.console import Reporter
from teal_cli.sparse import sparse_layers, sparsify_, use_backend
from teal_cli.versions import device_description, library_versions
from teal_cli.workspace import Workspace, calibration_for

_RANDOM_SEQUENCES, _RANDOM_SEQ_LEN, _SINK_TOKENS = 4, 128, 4


@dataclass(frozen=True)
class BenchResult:
    """Decoding speeds, the first of them dense, and kernel times where asked."""

    model: str
    device: str
    dtype: str
    prompt_tokens: int
    new_tokens: int
    repeats: int
    random_weights: bool
    seed: int
    versions: dict[str, str]
    runs: list[DecodeRun]
    kernels: list[KernelRun]

    def to_json(self) -> dict[str, Any]:
        """The contract of `teal bench --json` (docs/formats.md)."""
        return asdict(self)


def bench(config: BenchConfig, reporter: Reporter, workspace: Workspace | None = None) -> BenchResult:
    """Time decoding of a real model, or of an alias's shape with random weights.

    Raises:
        TealError: anything wrong with model, calibration or machine.
    """
    if config.random_weights:
        name, model, plans, prompt = _random(config, reporter)
    else:
        name, model, plans, prompt = _real(config, reporter, workspace)
    engine = Engine(model)
    engine.check_length(prompt.shape[1], config.new_tokens)
    control = engine.control
    if control is None:
        raise UsageError("nothing to bench: the model has no sparse layers")
    backend = use_backend(control, config.backend, engine.device, model.dtype)
    total = (len(plans) + 1) * (config.repeats + 1) * config.new_tokens
    with reporter.progress(f"decoding {name}", total) as advance:
        runs = bench_decode(
            engine, plans, prompt, new_tokens=config.new_tokens, repeats=config.repeats, on_tokens=advance
        )
    kernels: list[KernelRun] = []
    if config.kernels:
        shapes = sorted({(layer.out_features, layer.in_features) for layer in sparse_layers(model).values()})
        reporter.say(f"timing the products of {len(shapes)} shapes")
        kernels = bench_kernels(
            shapes,
            [plan.target_sparsity for plan in plans],
            backend=backend,
            device=engine.device,
            dtype=model.dtype,
            seed=config.seed,
        )
    return BenchResult(
        model=name,
        device=device_description(engine.device),
        dtype=str(model.dtype).removeprefix("torch."),
        prompt_tokens=prompt.shape[1],
        new_tokens=config.new_tokens,
        repeats=config.repeats,
        random_weights=config.random_weights,
        seed=config.seed,
        versions=library_versions(),
        runs=runs,
        kernels=kernels,
    )


def _wanted(config: BenchConfig) -> list[float]:
    """Sparsities to measure; 0 is the dense run, which is always there."""
    return sorted({value for value in config.sparsity if value > 0})


_Prepared = tuple[str, Any, Sequence[SparsityPlan], Tensor]


def _real(config: BenchConfig, reporter: Reporter, workspace: Workspace | None) -> _Prepared:
    workspace = workspace or Workspace.of(config, reporter)
    source = workspace.source
    prompt = text_prompt(load_tokenizer(source.folder), config.prompt_tokens, config.seed)
    if source.is_teal_checkpoint:
        plan = source.plan
        if "sparsity" in config.model_fields_set and _wanted(config) != [plan.target_sparsity]:
            raise UsageError(
                f"{source.folder} was exported at sparsity {plan.target_sparsity}: name the dense model to bench others"
            )
        return source.name, load_model(source.folder, device=config.device, dtype=config.dtype), [plan], prompt
    calibration = calibration_for(config, workspace, reporter)
    plans = [make_plan(calibration, value, config.allocation) for value in _wanted(config)]
    model = load_model(source.folder, device=config.device, dtype=config.dtype)
    sparsify_(model, make_plan(calibration, 0.0, config.allocation))
    return source.name, model, plans, prompt


def _random(config: BenchConfig, reporter: Reporter) -> _Prepared:
    """Random weights, with thresholds measured on them, so that the sparsity is realised."""
    alias = require_alias(config.model)
    reporter.say(f"building {alias.name} with random weights")
    model = build_random_model(alias, device=config.device, dtype=config.dtype, seed=config.seed)
    vocabulary = int(alias.shape["vocab_size"])
    projections = find_projections(model)
    text = [random_prompt(vocabulary, _RANDOM_SEQ_LEN, config.seed + 1 + index) for index in range(_RANDOM_SEQUENCES)]
    calibration = Calibration(
        CalibrationInfo(
            model=alias.name,
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
        collect(model, projections, text, sink_tokens=_SINK_TOKENS),
    )
    plans = [make_plan(calibration, value, config.allocation) for value in _wanted(config)]
    sparsify_(model, make_plan(calibration, 0.0, config.allocation))
    return f"{alias.name} (random weights)", model, plans, random_prompt(vocabulary, config.prompt_tokens, config.seed)
