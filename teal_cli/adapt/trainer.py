"""transformers' Trainer for one stage: its loop, processes and precision; our loss, checkpoints, early stopping."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.utils.data import Dataset, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from teal_cli.adapt import state
from teal_cli.adapt.distil import Student
from teal_cli.adapt.graphs import GraphedPasses
from teal_cli.adapt.recipe import Stage
from teal_cli.adapt.training import Figures, Held, Plan
from teal_cli.atomic import atomic_folder
from teal_cli.errors import UsageError
from teal_cli.models.offload import is_spread


class AdaptTrainer(Trainer):
    """Trains a student for one stage.

    Args:
        student: its forward is the loss.
        stage: its steps.
        plan: how.
        trainable: names of the parameters of `student.model` that train; the others must be frozen already.
        text: in the order in which it is read.
        held_out: to evaluate on.
        held: changed in place as the run goes on.
        tell: told figures as they are logged, by every process.
        on_step: told the number of each optimiser step once it is done.
        say: one line for the user.
        resumes: whether a checkpoint of this stage is taken up. A stage that begins is evaluated first: what training
            makes worse is not kept.
    """

    def __init__(
        self,
        student: Student,
        stage: Stage,
        plan: Plan,
        trainable: Sequence[str],
        text: Dataset[dict[str, Tensor]],
        held_out: Dataset[dict[str, Tensor]],
        held: Held,
        tell: Callable[[Figures], None],
        on_step: Callable[[int], None],
        say: Callable[[str], None],
        *,
        resumes: bool,
    ) -> None:
        self.student, self.stage, self.plan, self.held, self.tell = student, stage, plan, held, tell
        self.on_step, self._say = on_step, say
        self._graphs: GraphedPasses | None = None
        self._saved = time.monotonic()
        self.trainable = list(trainable)
        student.at, student.accumulate = (stage.name, 0, stage.steps), plan.accumulate
        steps = max(1, min(plan.evaluate_every, stage.steps))
        arguments = TrainingArguments(
            output_dir=str(plan.folder),
            max_steps=stage.steps,
            per_device_train_batch_size=plan.batch_size // plan.processes,
            per_device_eval_batch_size=plan.batch_size // plan.processes,
            gradient_accumulation_steps=plan.accumulate,
            learning_rate=plan.learning_rate,
            lr_scheduler_type=plan.schedule,
            warmup_steps=round(plan.warmup * stage.steps),
            weight_decay=0.0,
            max_grad_norm=plan.clip,
            bf16=plan.bf16,
            use_cpu=plan.on_cpu,
            logging_steps=plan.log_every,
            logging_nan_inf_filter=False,
            eval_strategy="steps",
            eval_steps=steps,
            eval_on_start=not resumes,
            save_strategy="no",  # `_Steps` says when
            report_to=[],
            ddp_find_unused_parameters=False,
            disable_tqdm=True,
            remove_unused_columns=False,
            prediction_loss_only=True,
            label_names=[],
            seed=plan.seed,
            log_level="error",
        )
        if arguments.n_gpu > 1:  # without a launcher: one process has one GPU
            arguments._n_gpu = 1
        super().__init__(student, arguments, train_dataset=text, eval_dataset=held_out, callbacks=[_Steps(self)])
        self.remove_callback(PrinterCallback)
        self.loss_is_scaled_for_ga = False

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW without decay, on the recipe's learning rates."""
        if self.optimizer is None:
            parameters = dict(self.student.model.named_parameters())
            rates: dict[float, list[Any]] = {}
            for name in self.trainable:
                rate = self.student.recipe.learning_rate(name, self.plan.learning_rate)
                rates.setdefault(rate, []).append(parameters[name])
            groups = [{"params": group, "lr": rate} for rate, group in rates.items()]
            self.optimizer = torch.optim.AdamW(groups, lr=self.plan.learning_rate, weight_decay=0.0)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The text is in its order already."""
        text: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(text)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One pass with its backward; see `GraphedPasses`."""
        student, recipe = self.student, self.student.recipe
        _, step, steps = student.at
        recipe.before_pass_(step / steps)
        if not (recipe.can_replay and self._can_graph) or step == 0:  # after a step there are moments
            return super().training_step(model, inputs, num_items_in_batch)
        if self._graphs is None:
            self._graphs = GraphedPasses(student, self.accelerator.autocast, 1 / self.plan.accumulate, self._say)
        model.train()
        return self._graphs.run(self._prepare_inputs(inputs)) / self.plan.accumulate

    @property
    def _can_graph(self) -> bool:
        """Whether passes can be CUDA graphs here: by one process, on one GPU, unless it was tried in vain."""
        works = self._graphs is None or self._graphs.works
        alone = self.plan.processes == 1 and not is_spread(self.student.model)
        return works and alone and self.args.device.type == "cuda"

    def prediction_step(self, model: Any, inputs: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The distillation loss alone."""
        with torch.no_grad():
            (loss,) = model(**self._prepare_inputs(dict(inputs)))
        return loss.detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Keep figures in the curve, and refuse to go on with a loss that is none."""
        if "loss" in logs:
            self._figures({"loss": logs["loss"], **self.student.recipe.figures(self.student.progress)})
        elif "eval_loss" in logs:
            self._figures({"held_out_loss": logs["eval_loss"]})

    def _figures(self, found: Figures) -> None:
        figures = {"stage": float(self.held.stage), "step": float(self.state.global_step), **found}
        realised = self.student.progress.realised
        if realised is not None:
            figures["sparsity"] = realised
        self.held.curve.append(figures)
        self.tell(figures)
        for name in ("loss", "held_out_loss"):
            if not math.isfinite(figures.get(name, 0.0)):
                raise UsageError(
                    f"the loss is no number any more, at step {self.state.global_step}: lower the learning rate "
                    f"(flag --learning-rate, now {self.plan.learning_rate:g})"
                )

    @property
    def _inner_optimiser(self) -> torch.optim.Optimizer:
        """Without accelerate's wrapper."""
        wrapped: Any = self.optimizer
        found: torch.optim.Optimizer = wrapped.optimizer
        return found

    @property
    def _schedule(self) -> Any:
        """Of the learning rate, which Trainer has made by now."""
        return self.lr_scheduler

    def is_checkpoint_due(self) -> bool:
        """Whether the last one is old enough; of several processes the first one's clock counts.

        A checkpoint of all weights holds five times their bytes: written at every look, it would take longer than a
        short run's training.
        """
        due = [time.monotonic() - self._saved >= self.plan.save_seconds]
        broadcast_object_list(due)
        if due[0]:
            self._saved = time.monotonic()
        return due[0]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Our own form of a checkpoint, whole or not at all, in the place of the one before. Rank 0 writes."""
        student = self.student
        groups = {
            "parameters": {**self.held.done, **state.parameters_of(student.model, self.trainable)},
            "moments": state.moments_of(student.model, self._inner_optimiser),
            "recipe": {name: tensor.detach().cpu() for name, tensor in student.recipe.state().items()},
            "best": self.held.best_weights,
            "measured": self.held.measured,
        }
        if not self.is_world_process_zero():
            return
        schedule = {k: v for k, v in self._schedule.state_dict().items() if k != "lr_lambdas"}
        self.state.stateful_callbacks = {}  # type: ignore[assignment]  # ours have none
        with atomic_folder(self.plan.folder / state.CHECKPOINT) as folder:
            state.write(folder, groups, {**self.held.as_json(), "schedule": schedule})
            self.state.save_to_json(str(folder / state.TRAINER))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Parameters, the recipe's state and what is held."""
        groups, run = state.read(Path(resume_from_checkpoint))
        parameters = groups.get("parameters", {})
        state.put_parameters_(self.student.model, parameters)
        self.held.done = {name: value for name, value in parameters.items() if name not in set(self.trainable)}
        self.student.recipe.load_state(groups.get("recipe", {}))
        self.held.best_weights = groups.get("best", {})
        for name, value in run.items():
            if name in self.held.as_json():
                setattr(self.held, name, value)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Moments and where the schedule stands."""
        if checkpoint is None:
            return
        groups, run = state.read(Path(checkpoint))
        state.put_moments_(self.student.model, self._inner_optimiser, groups.get("moments", {}))
        self._schedule.load_state_dict({**self._schedule.state_dict(), **run["schedule"]})
        for group, rate in zip(self._inner_optimiser.param_groups, run["schedule"]["_last_lr"], strict=True):
            group["lr"] = rate

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """A step draws no random numbers."""

    def _load_scaler(self, checkpoint: str | None) -> None:
        """bfloat16 needs no scaling of gradients."""

    def note_evaluation(self, loss: float) -> bool:
        """Keep the best weights of a stage that wants it; whether the stage is to end."""
        if not self.stage.keep_best:
            return False
        held = self.held
        if not held.best or loss < held.best["loss"]:
            held.best = {"step": float(self.state.global_step), "loss": loss}
            held.best_weights = state.parameters_of(self.student.model, self.trainable)
            held.worse = 0
        else:
            held.worse += 1
        held.stopped = bool(self.plan.patience) and held.worse >= self.plan.patience
        return held.stopped


class _Steps(TrainerCallback):
    """Tells the student where the run stands, asks for checkpoints, and ends a stage that gets no better."""

    def __init__(self, trainer: AdaptTrainer) -> None:
        self._trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stage = self._trainer.stage
        self._trainer.student.at = (stage.name, state.global_step, stage.steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.on_step(state.global_step)
        if state.global_step >= state.max_steps:
            control.should_log = control.should_evaluate = True

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if metrics is None:
            return
        control.should_training_stop |= self._trainer.note_evaluation(float(metrics["eval_loss"]))
        control.should_save = state.global_step > 0 and self._trainer.is_checkpoint_due()
