"""Adapt: a dense model, text and a recipe in; an adapted model out."""

import gc
import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from teal_cli.adapt import lora, memory
from teal_cli.adapt.data import HeldOut, Text, pools_of
from teal_cli.adapt.loop import Run, Trained, forget, run
from teal_cli.adapt.processes import Processes
from teal_cli.adapt.recipe import Recipe, Setting
from teal_cli.adapt.recipes import recipe_class
from teal_cli.adapt.state import folder_for
from teal_cli.adapt.training import Plan
from teal_cli.adapt.watch import Watch
from teal_cli.adapt.write import write_adapted
from teal_cli.checkpoint.adapted import Record, read_record, stored
from teal_cli.config import AdaptConfig
from teal_cli.console import Reporter
from teal_cli.data import check_dataset
from teal_cli.errors import MachineError, UsageError
from teal_cli.model_loading import load_model
from teal_cli.models.forward import check_positions
from teal_cli.models.layers import Experts
from teal_cli.models.loading import DTYPES, available_bytes, outline, pick_device, pick_dtype, stored_dtype, use_threads
from teal_cli.models.offload import devices, offload_, require_offload, spread_
from teal_cli.models.tokenizing import load_tokenizer
from teal_cli.planning import allocate, allocations, recalibrate
from teal_cli.sparse import control_of, sparsify_
from teal_cli.steps.adapt_record import (
    MEASURED_ON,
    Reads,
    check_place,
    measured_on,
    quality,
    record,
    settings_of,
    source_of,
)
from teal_cli.steps.artefacts import calibration_for
from teal_cli.version import __version__
from teal_cli.workspace import Workspace, digits_of
from teal_cli.writing import check_folder, require

_LOGS = 100
"""Points of a curve."""
_OF_THRESHOLDS = {"allocation", "calibration", "recalibrate", "limits", "cost", "dense_prefix"}
"""Keys of recipes that train under an export's thresholds."""
_ROOM_BESIDE = 1.25
"""Free memory over the weights of the dense model, for it to be compared with where the adapted one lies."""
_RATES = {"all": 5e-5, "lora": 3e-4, "frozen": 3e-3}


@dataclass(frozen=True)
class AdaptSummary:
    """What `teal adapt` made."""

    folder: str
    record: Record
    is_first: bool = True
    """Whether this process is the one that wrote it, of those that `accelerate launch` started."""

    def to_json(self) -> dict[str, Any]:
        """The contract of `teal adapt --json`: adapt.json, and where it lies."""
        return {"folder": self.folder, **self.record.model_dump(mode="json")}


def adapt(config: AdaptConfig, reporter: Reporter, workspace: Workspace | None = None) -> AdaptSummary:
    """Train a model by a recipe and write what comes out; a run that was cut short goes on where it ended.

    Under `accelerate launch` each process calls it; the first one writes and talks.

    Raises:
        TealError: anything wrong with options, model, text or machine.
    """
    use_threads(config.threads)
    processes = Processes.of(config.device)
    reporter = reporter if processes.is_first else Reporter(quiet=True)
    for dataset in config.dataset:
        check_dataset(dataset)
    with processes.first_goes_first():
        workspace = workspace or Workspace.of(config, reporter)
    out = config.out or adapted_folder(config, workspace)
    recipe = recipe_class(config.recipe)(
        Setting(config.recipe_options, config.seed, _target(config), config.lora, say=reporter.say)
    )
    _check(config, workspace, recipe, out, processes)
    plan, before = None, None
    with processes.first_goes_first():
        calibration = calibration_for(config, workspace, reporter) if recipe.needs_plan else None
    dense = _load(config, workspace, config.dtype)
    reads = _read(config, workspace, dense, reporter)
    if calibration is not None:
        plan = allocate(config, calibration, config.sparsity, allocations(config, calibration, reporter)[0])
        sparsify_(dense, plan)
        plan, _ = recalibrate(config, plan, calibration, workspace.source, reporter, dense)
        recipe = type(recipe)(replace(recipe.setting, plan=plan))
        before = quality(dense, dense, plan, reads.held_out)
        control_of(dense).enabled = False
    teachers = [] if _is_frozen(recipe) else [dense]  # else the student may be its own teacher
    del dense
    gc.collect()
    model = _load(config, workspace, _base_dtype(config, workspace, recipe, pick_device(config.device)))
    state = folder_for(out)
    trained = _train(config, workspace, recipe, model, reads, teachers, state, reporter, processes)
    gc.collect()  # the optimiser's moments
    if processes.is_first:
        teachers = teachers or [_load_beside(model, config, workspace, reporter)]
        after = quality(model, teachers[0], trained.outcome.plan, reads.held_out)
        found = record(config, recipe, workspace, reads, trained, (before, after), model)
        info = measured_on(config, workspace, reads, trained, model)
        row = workspace.row(config)
        write_adapted(workspace.source.folder, out, model, trained.outcome, stored(found), info, row)
        forget(state)
    processes.wait()
    return AdaptSummary(str(out), read_record(out), processes.is_first)


def adapted_folder(config: AdaptConfig, workspace: Workspace) -> Path:
    """Where `teal adapt` writes by default: RUNS/<model>/<recipe>, -<sparsity> if asked for, the rank of adapters."""
    target, rank = _target(config), f"-lora{config.lora}" if config.lora else ""
    return workspace.run / f"{config.recipe}{'' if target is None else f'-{digits_of(target)}'}{rank}"


def _target(config: AdaptConfig) -> float | None:
    """The sparsity that was asked for; None where nobody did and the recipe can do without."""
    asked = recipe_class(config.recipe).needs_plan or "sparsity" in config.model_fields_set
    return config.sparsity if asked else None


def _check(config: AdaptConfig, workspace: Workspace, recipe: Recipe, out: Path, processes: Processes) -> None:
    """Refuse what can be refused before anything is loaded or calibrated."""
    if config.quantise is not None:
        raise UsageError(
            "quantise (flag --quantise) is for a model that is not trained any more: adapt it first, then quantise "
            "what came out"
        )
    workspace.require_dense("adapt")
    require(check_folder, out.parent)
    check_place(config, workspace, out)
    _check_options(config, recipe)
    if config.lora:
        lora.require_peft()
    if workspace.kind(config) != "causal":
        raise UsageError(f"{workspace.source.name} is no decoder, and teal adapt distils the next token: name another")
    if config.batch_size % processes.count:
        raise UsageError(
            f"batch_size ({config.batch_size}, flag --batch-size) is no multiple of the {processes.count} processes"
        )
    empty = outline(workspace.source.folder, workspace.architecture(config))
    check_positions(empty, config.seq_len)
    recipe.check(empty)
    if config.device_map == "auto":
        if processes.count > 1:
            raise UsageError("device_map auto (flag --device-map) is for one process: start teal without a launcher")
        require_offload(empty, "device_map auto (flag --device-map)")
    device, frozen = pick_device(config.device), _is_frozen(recipe)
    used = pick_dtype(config.dtype, _stored(workspace), device)
    frozen_itemsize = DTYPES[_base_dtype(config, workspace, recipe, device)].itemsize
    activation_itemsize = 2 if _autocasts(config, device) else 4
    tokens = config.batch_size // processes.count * config.seq_len
    memory.require(
        memory.estimate(
            empty,
            trained=memory.trained_parameters(empty, lora=config.lora, frozen=frozen),
            frozen_itemsize=frozen_itemsize,
            teacher_itemsize=0 if frozen and recipe.is_own_teacher else used.itemsize,
            tokens=tokens,
            recompute=config.recompute,
            keeps_hidden=config.hidden_weight > 0,
            activation_itemsize=activation_itemsize,
            device=device,
            added=recipe.adds(
                empty,
                tokens=tokens,
                measured=max(MEASURED_ON, config.seq_len),
                itemsizes=(activation_itemsize, frozen_itemsize),
            ),
        ),
        _places(config, device),
    )


def _check_options(config: AdaptConfig, recipe: Recipe) -> None:
    """Refuse what was asked for and would do nothing."""
    idle = set() if recipe.needs_plan else _OF_THRESHOLDS
    idle = idle if recipe.takes_sparsity else idle | {"sparsity"}
    for key in sorted(idle & config.model_fields_set):
        if getattr(config, key) not in (None, {}):
            flag = key.replace("_", "-")
            raise UsageError(f"{key} (flag --{flag}) has no part in recipe {recipe.name}: leave it out")


def _base_dtype(config: AdaptConfig, workspace: Workspace, recipe: Recipe, device: torch.device) -> str:
    """In what the dense weights are held: float32, unless they stay as they are and autocast meets other dtypes."""
    return _stored(workspace) if _is_frozen(recipe) and _autocasts(config, device) else "float32"


def _is_frozen(recipe: Recipe) -> bool:
    """Whether the weights of the dense model stay as they are while it trains."""
    return bool(recipe.setting.lora) or recipe.base_is_frozen


def _stored(workspace: Workspace) -> str:
    """The name of the dtype in which the dense model lies on disk: weights that do not train keep every bit."""
    found = stored_dtype(workspace.source.folder, workspace.source.config)
    return found if found in DTYPES else "float32"


def _autocasts(config: AdaptConfig, device: torch.device) -> bool:
    """Whether products are computed in bfloat16: on a GPU that can, unless float32 was asked for."""
    return device.type == "cuda" and config.dtype != "float32" and torch.cuda.is_bf16_supported()


def _load(config: AdaptConfig, workspace: Workspace, dtype: str) -> Any:
    """The dense model, where it trains."""
    if config.device_map == "one":
        architecture = workspace.architecture(config)
        return load_model(workspace.source.folder, device=config.device, dtype=dtype, architecture=architecture)
    model = _load_into_main_memory(config, workspace, dtype)
    spread_(model, to_train=True)
    return model


def _load_into_main_memory(config: AdaptConfig, workspace: Workspace, dtype: str) -> Any:
    """The dense model, in the dtype that it has where it computes."""
    used = str(pick_dtype(dtype, _stored(workspace), pick_device(config.device))).removeprefix("torch.")
    return load_model(workspace.source.folder, device="cpu", dtype=used, architecture=workspace.architecture(config))


def _load_beside(model: Any, config: AdaptConfig, workspace: Workspace, reporter: Reporter) -> Any:
    """The dense model, to compare the adapted one with; in main memory where GPUs have no room for both."""
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, _stored(workspace), device)
    size = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    free = sum(available_bytes(each) or 0 for each in _places(config, device))
    stacked = any(isinstance(module, Experts) for module in model.modules())  # accelerate would lose these
    if device.type == "cpu" or stacked:
        return _load(config, workspace, config.dtype)
    if free > _ROOM_BESIDE * size:
        with suppress(MachineError):  # room enough, but not where blocks of a spread model would lie
            return _load(config, workspace, config.dtype)
    reporter.say("the GPU has no room for the dense model beside the adapted one: comparing from main memory")
    dense = _load_into_main_memory(config, workspace, config.dtype)
    offload_(dense, device)
    return dense


def _places(config: AdaptConfig, device: torch.device) -> list[torch.device]:
    """Where the blocks lie."""
    return devices(device) if config.device_map == "auto" else [device]


def _read(config: AdaptConfig, workspace: Workspace, dense: Any, reporter: Reporter) -> Reads:
    """The text of the run; that of dataset self is written here."""
    count = config.steps * config.batch_size * config.accumulate
    held_out = config.held_out_tokens // config.seq_len
    if "self" in config.dataset:
        reporter.say(f"sampling text from {workspace.source.name} itself")
    pools = pools_of(
        config.dataset,
        load_tokenizer(workspace.source.folder),
        seq_len=config.seq_len,
        count=count,
        validation=held_out,
        seed=config.seed,
        model=dense,
    )
    text = Text(pools, config.dataset, count=count, most_prefix=config.most_prefix, seed=config.seed)
    reporter.say(
        f"{count * config.seq_len:,} tokens in {config.steps:,} steps from {', '.join(config.dataset)}, "
        f"the most read of it {text.repeats():.1f} times"
    )
    return Reads(pools, text, torch.cat([pool.held_out for pool in pools.values()]))


def _train(
    config: AdaptConfig,
    workspace: Workspace,
    recipe: Recipe,
    model: Any,
    reads: Reads,
    teachers: Sequence[Any],
    state: Path,
    reporter: Reporter,
    processes: Processes,
) -> Trained:
    """Run the loop."""
    every = config.evaluate_every or max(1, config.steps // 10)
    frozen = _is_frozen(recipe)
    divisors = (n for n in range(max(1, config.steps // _LOGS), every) if every % n == 0)
    plan = Plan(
        folder=state,
        batch_size=config.batch_size,
        processes=processes.count,
        accumulate=config.accumulate,
        learning_rate=config.learning_rate or _RATES["lora" if config.lora else "frozen" if frozen else "all"],
        warmup=config.warmup,
        schedule=config.schedule,
        clip=config.clip,
        bf16=_autocasts(config, model.device),
        on_cpu=model.device.type == "cpu",
        log_every=next(divisors, every),
        evaluate_every=every,
        save_seconds=60 * config.checkpoint_minutes,
        patience=config.patience,
        seed=config.seed,
    )
    watch = Watch(reporter, config.steps, config.tokens_a_step)
    first = reads.text.first(max(1, MEASURED_ON // config.seq_len))
    with watch.bar(f"adapting by {recipe.name}"):
        return run(
            Run(
                model=model,
                recipe=recipe,
                plan=plan,
                steps=config.steps,
                text=reads.text,
                held_out=HeldOut(reads.held_out, config.seq_len // 2),
                sequences=first.to(model.device),
                key=_key(config, workspace, recipe, reads, processes),
                teacher=lambda: teachers[0] if teachers else _load(config, workspace, config.dtype),
                text_weight=config.text_weight,
                hidden_weight=config.hidden_weight,
                recompute=config.recompute,
                dtype=DTYPES[_stored(workspace)],
                tell=watch.tell,
                on_step=watch.step,
                say=reporter.say,
            )
        )


def _key(config: AdaptConfig, workspace: Workspace, recipe: Recipe, reads: Reads, processes: Processes) -> str:
    """Digest of all that the weights at the end depend on."""
    source = source_of(config, workspace)
    content = {
        "settings": settings_of(config),
        "weights": [source.weights, source.configuration],
        "text": [used.sha256 for used in reads.used(config)],
        "plan": None if recipe.setting.plan is None else recipe.setting.plan.digest(),
        "processes": processes.count,
        "version": __version__,
    }
    if recipe.form:  # without it in the key of the first one, whose runs were written before there were several
        content["form"] = recipe.form
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
