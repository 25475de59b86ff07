"""One run, from the dense model to what it leaves behind."""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from teal_cli.adapt import lora, state
from teal_cli.adapt.distil import Student, Teacher
from teal_cli.adapt.logits import LogitMaker
from teal_cli.adapt.norms import fused_norms
from teal_cli.adapt.recipe import Outcome, Recipe, Stage
from teal_cli.adapt.training import Figures, Held, Plan
from teal_cli.reading import read_json


@dataclass
class Run:
    """What a run is made of."""

    model: Any
    """The dense model, in eval mode, on its device."""
    recipe: Recipe
    plan: Plan
    """How each stage is trained."""
    steps: int
    text: Dataset[dict[str, Tensor]]
    held_out: Dataset[dict[str, Tensor]]
    sequences: Tensor
    """(sequences, tokens) int64 of the training text, to measure on."""
    key: str
    """Digest of all that the run depends on: a checkpoint of another run is not resumed."""
    teacher: Callable[[], Any]
    """Loads the dense model once more, for recipes whose student cannot be its own teacher."""
    text_weight: float = 0.0
    hidden_weight: float = 0.0
    recompute: bool = False
    dtype: torch.dtype = torch.float32
    """What the trained parameters are cast to at the end, before thresholds are set by them."""
    tell: Callable[[Figures], None] = lambda figures: None
    """Told figures as they are logged; `step` is that of the run."""
    on_step: Callable[[int], None] = lambda step: None
    """Told the number of each optimiser step of the run, once it is done."""
    say: Callable[[str], None] = lambda message: None


@dataclass(frozen=True)
class Trained:
    """What came out."""

    outcome: Outcome
    curve: list[Figures]
    """What was logged, in order: `stage`, `step`, `loss` or `held_out_loss`, `sparsity`, and the recipe's figures."""
    best: Figures
    """`step` and `loss` of the weights that were kept, in the last stage; empty where it kept its last."""
    stopped: bool
    """Whether the last stage ended early."""
    seconds: float
    """Of this process; a resumed run's earlier ones are not in it."""
    parameters: int
    """That were trained."""


def switch_off_dropout_(model: nn.Module) -> None:
    """No dropout: the student is held against the teacher token by token, and a resumed run must end the same."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "attn_pdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def run(setup: Run) -> Trained:
    """Measure, operate, train, finish. A checkpoint of the same run is taken up where it ended.

    Raises:
        TealError: from the recipe, or a loss that is no number.
    """
    started = time.perf_counter()
    recipe, model = setup.recipe, setup.model
    resumed = _resumable(setup.plan.folder, setup.key, setup.say)
    switch_off_dropout_(model)
    LogitMaker(model).require_exact()
    held = Held(setup.key, measured=_measured(setup, resumed))
    recipe.operate_(model, held.measured)
    model.requires_grad_(False)
    adapters = _adapters(setup)
    teacher = _teacher(setup)
    student = Student(model, teacher, recipe, setup.text_weight, setup.hidden_weight)
    if setup.recompute:
        _recompute_(model, student)
    first = 0 if resumed is None else int(read_json(resumed / state.RUN, "state of a run")["stage"])
    steps = 0
    for number, stage in enumerate(recipe.stages(setup.steps)):
        recipe.begin_stage_(model, stage)
        names = _trainable_(model, recipe, stage, adapters)
        if number >= first:
            # On a CPU nothing is launched, and norms keep their bits.
            with fused_norms([] if setup.plan.on_cpu else [model, teacher.maker.model]):
                _train(setup, student, stage, number, names, held, resumed if number == first else None, steps)
            state.put_parameters_(model, held.best_weights)
            held.done |= state.parameters_of(model, names)
        steps += stage.steps
    if recipe.setting.lora:
        lora.merge_(model)
    model.to(setup.dtype).eval().requires_grad_(False)
    if recipe.followed is not None:
        recipe.followed.stop()
    outcome = recipe.finish_(model, setup.sequences)
    trained = sum(tensor.numel() for tensor in held.done.values())
    return Trained(outcome, held.curve, held.best, held.stopped, time.perf_counter() - started, trained)


def forget(folder: Path) -> None:
    """Remove the state of a run that is over."""
    shutil.rmtree(folder, ignore_errors=True)


def _resumable(folder: Path, key: str, say: Callable[[str], None]) -> Path | None:
    found = state.checkpoint_in(folder)
    if found is None:
        return None
    run = read_json(found / state.RUN, "state of a run")
    if run.get("key") != key:
        say(f"{folder} is the state of another run (options, text, weights or versions differ): beginning anew")
        return None
    step = read_json(found / state.TRAINER, "state of a run").get("global_step")
    say(f"resuming after step {step} of stage {run['stage'] + 1}")
    return found


def _measured(setup: Run, resumed: Path | None) -> Mapping[str, Tensor]:
    if resumed is not None:
        return state.read(resumed)[0].get("measured", {})
    return setup.recipe.measure(setup.model, setup.sequences)


def _adapters(setup: Run) -> list[str]:
    setting = setup.recipe.setting
    if not setting.lora:
        return []
    return lora.add_adapters_(setup.model, lora.adaptable(setup.model), setting.lora, setting.seed)


def _teacher(setup: Run) -> Teacher:
    """The student itself where its base stays as it is and the recipe can undo its surgery; else a copy."""
    recipe, model = setup.recipe, setup.model
    frozen = bool(recipe.setting.lora) or recipe.base_is_frozen
    if not frozen or recipe.as_dense(model) is None:
        return Teacher(setup.teacher().requires_grad_(False))

    def as_dense() -> AbstractContextManager[Any]:
        inside = recipe.as_dense(model)
        assert inside is not None  # noqa: S101  (it was one a moment ago)
        stack = ExitStack()
        stack.enter_context(inside)
        if recipe.setting.lora:
            stack.enter_context(lora.switched_off(model))
        return stack

    return Teacher(model, as_dense)


def _trainable_(model: nn.Module, recipe: Recipe, stage: Stage, adapters: Sequence[str]) -> list[str]:
    """Freeze all but what trains in a stage; that is float32, and named here."""
    frozen = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    output = model.get_output_embeddings()  # type: ignore[operator]
    frozen |= {id(parameter) for parameter in output.parameters()}
    parameters = dict(model.named_parameters())
    default = adapters or [name for name, parameter in parameters.items() if id(parameter) not in frozen]
    names = list(recipe.trainable(model, stage, default))
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in set(names))
    for name in names:
        parameters[name].data = parameters[name].data.float()
    return names


def _recompute_(model: Any, student: Student) -> None:
    """Hold the activations of one block at a time."""
    options = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": student.around_recomputed}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def _train(
    setup: Run,
    student: Student,
    stage: Stage,
    number: int,
    names: Sequence[str],
    held: Held,
    resumed: Path | None,
    steps_before: int,
) -> None:
    """One stage; from where it was cut short, if it was."""
    from teal_cli.adapt.trainer import AdaptTrainer  # which brings transformers' Trainer

    held.stage, held.best, held.best_weights, held.worse, held.stopped = number, {}, {}, 0, False
    rows = setup.plan.batch_size * setup.plan.accumulate
    text = Subset(setup.text, range(steps_before * rows, (steps_before + stage.steps) * rows))
    on_step = partial(_add, setup.on_step, steps_before)
    tell = partial(_tell, setup.tell, steps_before)
    trainer = AdaptTrainer(
        student,
        stage,
        setup.plan,
        names,
        text,
        setup.held_out,
        held,
        tell,
        on_step,
        setup.say,
        resumes=resumed is not None,
    )
    if resumed is not None:
        trainer._load_from_checkpoint(str(resumed))
        finished = read_json(resumed / state.TRAINER, "state of a run")["global_step"] >= stage.steps
        if finished or held.stopped:
            return
    trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))


def _tell(tell: Callable[[Figures], None], before: int, figures: Figures) -> None:
    tell({**figures, "step": before + figures["step"]})


def _add(on_step: Callable[[int], None], before: int, step: int) -> None:
    on_step(before + step)
