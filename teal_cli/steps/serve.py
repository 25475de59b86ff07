"""Serve: a model with its levels of sparsity, behind an HTTP server."""

import copy
import os
import signal
from collections.abc import Callable, Mapping
from typing import Any

from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.config import ServeConfig
from teal_cli.config_values import is_allocation_file
from teal_cli.console import Reporter
from teal_cli.decode.chat import stop_ids, wants_chat
from teal_cli.decode.engine import Engine
from teal_cli.decode.levels import DENSE
from teal_cli.decode.scheduler import Scheduler
from teal_cli.decode.template_process import TemplateProcess
from teal_cli.errors import UsageError
from teal_cli.model_loading import load_dense, load_model, ranks_for
from teal_cli.model_source import ModelSource
from teal_cli.models.loading import use_threads
from teal_cli.models.tokenizing import load_tokenizer
from teal_cli.planning import DEFAULT_SPARSITY, allocate, allocations
from teal_cli.quantise.model import pack_
from teal_cli.serve.grammars import Grammars
from teal_cli.serve.prompts import Prompts
from teal_cli.serve.server import address_of, bind, make_server, run
from teal_cli.serve.service import Served, Service
from teal_cli.serve.tool_calls import format_of
from teal_cli.sparse import apply_plan_, control_of, sparse_layers, sparsify_, use_backend
from teal_cli.steps.artefacts import calibration_for, checkpoint_for, require_own_plan
from teal_cli.steps.drafts import speculator_for
from teal_cli.workspace import Workspace

Levels = Mapping[float, SparsityPlan] | None
"""Plans of the levels above 0; None for the rules that the model has."""


def serve(config: ServeConfig, reporter: Reporter, on_ready: Callable[[dict[str, Any]], object]) -> bool:
    """Serve until a signal comes.

    Args:
        config: the model, limits and defaults.
        reporter: told what happens until the model is loaded.
        on_ready: told then where the server is and what it serves, as JSON.

    Returns:
        Whether nothing is at work any more; False where the model was still being loaded.

    Raises:
        TealError: anything wrong with model, calibration, machine or address.
    """
    key = _key(config)
    listening = bind(config.host, config.port)
    address = address_of(listening, config.host)

    def ready(served: Served) -> None:
        reporter.say(f"serving {served.name} at {address}")
        on_ready({"address": address, "pid": os.getpid(), "model": served.name, **served.describe()})

    def ended() -> None:
        server.should_exit = True

    with listening:
        service = Service(config, lambda: load(config, reporter), on_ready=ready, on_failure=ended)
        server = make_server(service, key)
        return run(server, service, listening)


def _key(config: ServeConfig) -> str | None:
    if config.api_key_env is None:
        return None
    key = os.environ.get(config.api_key_env, "").strip()
    if not key:
        raise UsageError(f"api_key_env (flag --api-key-env): the environment has no key in {config.api_key_env}")
    return key


def load(config: ServeConfig, reporter: Reporter, workspace: Workspace | None = None) -> Served:
    """Make a model ready to answer; missing stages are said and made. The thread that calls this is to decode.

    Raises:
        TealError: anything wrong with model, calibration or machine.
    """
    use_threads(config.threads)  # of this thread
    workspace = workspace or Workspace.of(config, reporter)
    workspace.require_decoder(config, "serve")
    if workspace.kind(config) != "causal":
        raise UsageError(f"{workspace.source.name} reads one text and writes another: teal serve needs a decoder")
    tokenizer = load_tokenizer(workspace.source.folder)
    chat = wants_chat(tokenizer, config.chat)
    templates = TemplateProcess(tokenizer) if chat else None  # before the weights: a fork copies what there is
    try:
        return _served(config, reporter, workspace, tokenizer, templates)
    except BaseException:
        if templates is not None:
            templates.close()
        raise


def check_address(config: ServeConfig) -> None:
    """Refuse an address or a key of no use, before ranks are started.

    Raises:
        TealError: as `serve`.
    """
    _key(config)
    bind(config.host, config.port).close()


def follow(config: ServeConfig, reporter: Reporter) -> None:
    """Do with this rank's shard what the first rank does, which serves, until it ends.

    Raises:
        TealError: anything wrong with model, calibration or machine, or another rank has ended.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # the first rank ends all, when its replies have come to their ends
        signal.signal(number, signal.SIG_IGN)
    use_threads(config.threads)
    _scheduler(config, reporter, Workspace.of(config, reporter)).follow()


def _scheduler(config: ServeConfig, reporter: Reporter, workspace: Workspace) -> Scheduler:
    model, levels, default = _model(config, reporter, workspace)
    if sparse_layers(model):
        use_backend(control_of(model), config.backend, model.device, model.dtype)
    drafts = config.speculate
    draft_level = next(iter(levels)) if levels and drafts is not None else None
    if levels:  # what the engine tries, and times where sparse steps may be slower; and what a copy drafts by
        apply_plan_(model, levels[draft_level or default or max(levels)])
    engine = Engine(model, never_worse=config.backend == "auto" and drafts is None)
    for line in engine.path.notes:  # which all ranks ask for
        reporter.say(line)
    speculator = None
    if drafts is not None:
        speculator, _ = speculator_for(engine, drafts, config.draft_tokens, reporter, {})
    scheduler = Scheduler(
        engine,
        slots=config.slots,
        positions=config.context,
        queue=config.queue,
        levels=levels,
        default=default if drafts is None else DENSE,
        speculator=speculator,
        draft_level=draft_level,
    )
    for line in scheduler.choice.lines if scheduler.choice else []:
        reporter.say(line)
    if engine.device.type == "cuda" and engine.path.own_kernels:
        reporter.say(f"compiling steps of 1 to {scheduler.slots.at_once} sequences, where this machine has not yet")
        scheduler.slots.prepare(sorted({DENSE, scheduler.levels.default}))
    return scheduler


def _served(
    config: ServeConfig, reporter: Reporter, workspace: Workspace, tokenizer: Any, templates: TemplateProcess | None
) -> Served:
    scheduler = _scheduler(config, reporter, workspace)
    engine, model = scheduler.engine, scheduler.engine.model
    if engine.general_because is not None:
        reporter.say(f"decoding with transformers' forward, not our own ({engine.general_because})")
    stop = stop_ids(model, tokenizer)
    vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)  # packed output layers have no weight
    return Served(
        name=workspace.source.name,
        scheduler=scheduler,
        prompts=Prompts(tokenizer, templates, scheduler.positions),
        decoder=copy.deepcopy(tokenizer),
        grammars=Grammars(tokenizer, vocabulary, stop),
        chat=templates is not None,
        tools=format_of(_template(tokenizer)) if templates is not None else None,
        stop=stop,
        intrinsic=config.mode == "intrinsic",
        speculates=None if config.speculate is None else config.speculate.text,
        close=templates.close if templates is not None else lambda: None,
    )


def _template(tokenizer: Any) -> str:
    """The source of its chat template; of several, the one that knows of tools."""
    found = tokenizer.chat_template
    if isinstance(found, dict):
        found = found.get("tool_use") or found.get("default") or ""
    return str(found)


def _model(config: ServeConfig, reporter: Reporter, workspace: Workspace) -> tuple[Any, Levels, float | None]:
    """The model, its levels, and the one of requests that name none."""
    source, drafts = workspace.source, config.speculate
    asked, ranks = config.sparsity, ranks_for(config)
    if asked is None and drafts is not None and not drafts.sparse:
        asked = [DENSE]  # nobody is to skip anything
    if config.mode == "intrinsic":
        model, _ = workspace.load_intrinsic(config, "serve")
        return model, None, None
    if source.is_teal_checkpoint:
        require_own_plan(config, source)
        own = source.plan.target_sparsity
        if asked is not None and not set(asked) <= {0.0, own}:
            raise UsageError(f"{source.folder} was exported at sparsity {own}: name the dense model to serve others")
        model = load_model(source.folder, device=config.device, dtype=config.dtype, ranks=ranks)
        return model, None, None if asked is None else asked[0]
    if asked is not None and not any(asked) and config.quantise is None:
        return load_model(source.folder, device=config.device, dtype=config.dtype, ranks=ranks), None, None
    calibration = calibration_for(config, workspace, reporter)
    (allocation,) = allocations(config, calibration, reporter)
    targets: list[float | None] = [target for target in asked or [DEFAULT_SPARSITY] if target > 0]
    if is_allocation_file(allocation):
        targets = [None]
    first = allocate(config, calibration, 0.0, "uniform")  # for the model, until it has a plan
    model, packs = load_dense(source.folder, config, calibration, ranks)
    sparsify_(model, first)
    levels = {}
    for target in targets:
        folder = checkpoint_for(config, target, workspace, reporter, allocation=allocation, model=model)
        plan = ModelSource(source.name, folder).plan
        levels[plan.target_sparsity] = plan
    pack_(model, packs)
    if asked is None:
        return model, levels, None
    default = next(iter(levels), None) if asked[0] > 0 else 0.0
    return model, levels, default
