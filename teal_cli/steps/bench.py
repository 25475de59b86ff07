"""Bench: how fast a model decodes, dense and at several sparsities."""

import gc
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from teal_cli.bench.decode import DecodeRun, bench_decode, decode_seconds
from teal_cli.bench.kernels import KernelRun, bench_kernels, bench_products
from teal_cli.bench.llama_cpp import LlamaBench, LlamaCppResult
from teal_cli.bench.products import ProductShape, reading_gb_s
from teal_cli.bench.speculation import SpeculativeRun
from teal_cli.bench.tune import Finalists, compilers, search, settle
from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.config import BenchConfig
from teal_cli.console import Reporter
from teal_cli.decode.choice import Choice
from teal_cli.decode.compiling import Compiling
from teal_cli.decode.engine import Engine
from teal_cli.decode.loop import TokenLoop
from teal_cli.errors import MachineError, UsageError
from teal_cli.models.architectures import (
    Projection,
    architecture_for,
    find_projections,
    output_projection,
)
from teal_cli.models.loading import pick_device, use_threads
from teal_cli.sparse import (
    SparseLinear,
    apply_plan_,
    control_of,
    sparse_layers,
    use_backend,
)
from teal_cli.sparse.quantised import Codes
from teal_cli.steps.artefacts import with_other_weights
from teal_cli.steps.bench_speculation import bench_speculation, check_prompts
from teal_cli.steps.beside_llama_cpp import llama_bench
from teal_cli.steps.prepared import Prepared, prepare
from teal_cli.versions import commit, device_description, library_versions
from teal_cli.workspace import Workspace
from teal_kernels import backend_unavailable_reason
from teal_kernels.tuning_entries import Provenance
from teal_kernels.tuning_files import keep_entries

_TUNED_TOKENS = 64
"""Decoded to time one tile config."""


@dataclass(frozen=True)
class BenchResult:
    """Decoding speeds, the first of them dense, and kernel times where asked."""

    model: str
    device: str
    dtype: str
    prompt_tokens: int
    new_tokens: int
    repeats: int
    batch: int
    mode: str
    """`calibrated`, or `intrinsic`: only the model's own zeros are skipped."""
    path: str
    """`compact`, the fused decode path, `native`, the compiled one on a CPU, or `general`, transformers' forward with
    sparse layers."""
    general_because: str | None
    """Why `general`, where one of the other two is for this device."""
    reading_gb_s: float | None
    """What the GPU's memory gives at most, measured in this run; None on a CPU."""
    random_weights: bool
    quantization: str
    """As `ModelConfig.quantisation`: empty, int8, int4-128, with -output where the output layer is too."""
    seed: int
    versions: dict[str, str]
    runs: list[DecodeRun]
    kernels: list[KernelRun]
    llama_cpp: LlamaCppResult | None = None
    """What was timed in turn with it, if anything."""
    speculation: list[SpeculativeRun] = field(default_factory=list)
    """What drafts cost and give, where asked."""
    tensor_parallel: int = 1
    """Processes that held the model together."""
    sums: list[str] = field(default_factory=list)
    """How they summed."""

    def beside(self, other: "BenchResult") -> "BenchResult":
        """Both as one, of the same model with other weights; the first dense run is what all are compared with."""
        dense = self.runs[0].tokens_per_second.median
        more = [replace(run, speedup=run.tokens_per_second.median / dense) for run in other.runs]
        return replace(self, runs=[*self.runs, *more])

    def to_json(self) -> dict[str, Any]:
        """The contract of `teal bench --json` (docs/formats.md)."""
        return asdict(self)


def bench(config: BenchConfig, reporter: Reporter, workspace: Workspace | None = None) -> BenchResult:
    """Time decoding of a real model, or of an alias's shape with random weights.

    With `also_quantise`, once more for each, one after another.

    Raises:
        TealError: anything wrong with model, calibration or machine.
    """
    use_threads(config.threads)
    if config.tune and pick_device(config.device).type != "cuda":  # before minutes of calibration
        raise MachineError("tuning times the GPU kernels, and there is no GPU here (`teal info` says more)")
    others: list[tuple[BenchConfig, Workspace | None]] = [(other, None) for other in config.others()]
    if not config.random_weights:
        workspace = workspace or Workspace.of(config, reporter)
    rival = llama_bench(config, workspace)
    if others and workspace is not None:
        others = [*with_other_weights(config, workspace, reporter)]
    result = measure(config, prepare(config, reporter, workspace), reporter, rival)
    for other, its_workspace in others:
        gc.collect()  # a GPU has no room for the model before it
        result = result.beside(measure(other, prepare(other, reporter, its_workspace), reporter))
    return result


def measure(
    config: BenchConfig, prepared: Prepared, reporter: Reporter, rival: LlamaBench | None = None
) -> BenchResult:
    """Time a prepared model, in turn with llama.cpp if asked; its prompt says how long a context, how large a batch."""
    name, model, plans, prompt = prepared.name, prepared.model, prepared.plans, prepared.prompt
    batch = prompt.shape[0]
    control = control_of(model)
    device = model.device
    backend = use_backend(control, config.backend, device, model.dtype)
    engine = Engine(model, never_worse=config.backend == "auto", compiling=Compiling(config.compile))
    engine.check_length(prompt.shape[1] + TokenLoop.first_steps(engine), config.new_tokens)
    if config.speculate:
        check_prompts(config, engine.max_length, prepared.prompts)
    for line in engine.path.notes:
        reporter.say(line)
    # Of all ranks' GPUs, which are alike.
    limit = reading_gb_s(device) * config.tensor_parallel if device.type == "cuda" else None
    dtype = str(model.dtype).removeprefix("torch.")
    if rival is not None:
        rival.model.require_width(prepared.quantization or dtype)
    if config.tune:
        _tune(config, engine, prepared, reporter)
    total = (len(plans) + 1) * (config.repeats + 1) * config.new_tokens
    choices: list[Choice] = []
    with reporter.progress(f"decoding {name}", total) as advance:
        runs = bench_decode(
            engine,
            plans,
            prompt,
            new_tokens=config.new_tokens,
            repeats=config.repeats,
            quantization=prepared.quantization,
            reading_gb_s=limit,
            llama_cpp=None if rival is None else rival.round,
            on_tokens=advance,
            on_choice=choices.append,
        )
    for line in dict.fromkeys(line for choice in choices for line in choice.lines):
        reporter.say(line)
    speculation: list[SpeculativeRun] = []
    if config.speculate:
        speculation = bench_speculation(config, engine, plans, prompt, prepared.prompts, reporter)
    kernels: list[KernelRun] = []
    if config.kernels:
        targets = [plan.target_sparsity for plan in plans]
        if limit is not None and engine.path.own_kernels:
            products = site_products(model)
            reporter.say(f"timing {len(products)} products")
            kernels = bench_products(
                products,
                targets,
                device=device,
                dtype=model.dtype,
                batch=batch,
                seed=config.seed,
                limit_gb_s=limit,
            )
        else:
            shapes = sorted({(layer.out_features, layer.in_features) for layer in sparse_layers(model).values()})
            reporter.say(f"timing the products of {len(shapes)} shapes")
            kernels = bench_kernels(
                shapes, targets, backend=backend, device=device, dtype=model.dtype, seed=config.seed
            )
    return BenchResult(
        model=name,
        device=device_description(device),
        batch=batch,
        mode=config.mode,
        path=engine.path.reported,
        general_because=engine.general_because,
        reading_gb_s=limit,
        dtype=dtype,
        prompt_tokens=prompt.shape[1],
        new_tokens=config.new_tokens,
        repeats=config.repeats,
        random_weights=config.random_weights,
        quantization=prepared.quantization,
        seed=config.seed,
        versions=library_versions(),
        runs=runs,
        kernels=kernels,
        llama_cpp=None if rival is None else rival.result(),
        speculation=speculation,
        tensor_parallel=config.tensor_parallel,
        sums=engine.path.notes,
    )


def site_products(model: Any) -> list[ProductShape]:
    """The products of the first block, and of an output layer that drops inputs now or is quantised."""
    layers = sparse_layers(model)
    parts: dict[str, list[Projection]] = {}
    for projection in find_projections(model):
        parts.setdefault(projection.site, []).append(projection)
    first = next(iter(parts)).rpartition(".")[0]
    of_block = [(site.rpartition(".")[2], group) for site, group in parts.items() if site.startswith(f"{first}.")]
    groups = [(group, architecture_for(model).epilogue_of(site)) for site, group in of_block]
    output = model.get_output_embeddings()
    if isinstance(output, SparseLinear) and not output.stays_as_it_is:
        groups.append(([output_projection(model, "--output-layer")], "plain"))
    shapes = []
    for group, epilogue in groups:
        layer = layers.get(group[0].name)
        scheme = layer.scheme if isinstance(layer, Codes) else None
        shapes.append(ProductShape(*_sizes(group, epilogue), epilogue, scheme))
    return shapes


def _sizes(group: list[Projection], epilogue: str) -> tuple[int, tuple[int, ...]]:
    """Inputs and outputs of a product; of experts those of one long product, as tile configs are chosen for them."""
    inputs, parts, chosen = group[0].in_features, tuple(p.out_features for p in group), group[0].chosen or 1
    if epilogue == "gated" and len(parts) == 1:  # gate and up in one projection
        parts = (parts[0] // 2,) * 2
    if epilogue == "residual":
        return inputs * chosen, parts
    return inputs, tuple(part * chosen for part in parts)


def _tune(config: BenchConfig, engine: Engine, prepared: Prepared, reporter: Reporter) -> None:
    """Search the products of a model on this GPU, and keep what is found for every later command.

    Raises:
        MachineError: the kernels do not run on this GPU.
    """
    device, batch = engine.device, prepared.prompt.shape[0]
    if (reason := backend_unavailable_reason("triton", device, prepared.model.dtype)) is not None:
        raise MachineError(f"tuning times the GPU kernels: {reason}")
    plans: dict[float, SparsityPlan | None] = {0.0: None, **{plan.target_sparsity: plan for plan in prepared.plans}}
    sparsities = [sparsity for sparsity in plans if sparsity > 0]
    if not sparsities:
        raise UsageError("tuning needs a sparsity above 0 (flag --sparsity)")
    apply_plan_(prepared.model, prepared.plans[-1])  # so that an output layer that will drop inputs is seen to
    found: list[Finalists] = []
    with compilers(device) as pool:
        for shape in site_products(prepared.model):
            reporter.say(f"searching {shape.inputs} x {'+'.join(map(str, shape.parts))}")
            product = shape.timed(dtype=prepared.model.dtype, rows=batch, device=device, seed=config.seed)
            found.append(search(product, sparsities, pool))
            del product
            torch.cuda.empty_cache()

    def token_seconds(sparsity: float) -> float:
        return decode_seconds(engine, plans[sparsity], prepared.prompt, _TUNED_TOKENS)

    if not engine.path.own_kernels:
        entries = [min(of_one, key=lambda entry: entry.cost) for finalists in found for of_one in finalists.values()]
    else:
        reporter.say("trying the best in the model")
        entries = settle(found, token_seconds)
    name = torch.cuda.get_device_name(device)
    path = keep_entries(entries, name, Provenance.here(name, commit()))
    reporter.say(f"kept in {path}")
