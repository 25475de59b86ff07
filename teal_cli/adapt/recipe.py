"""What a recipe of learned sparsity gives to the loop.

The loop calls these in this order. A killed run that resumes calls all of them again but `measure`:

1. `measure`, once, on the dense model: what the surgery needs to know of text. Kept with the run.
2. `operate_`: surgery on the model. Deterministic: a resumed run does it again, and then loads what was trained.
3. For each of `stages`: `begin_stage_`, then `trainable`, an optimiser of its own, and steps. Each step is
   `before_pass_`, a pass of the student inside `student_pass`, the distillation loss, `extra_loss` of the pass just
   run, and a backward pass. On a GPU passes of one `pass_kind` are replays of one that was captured (`adapt.graphs`).
4. `finish_`, with the best weights in place, adapters merged and nothing that follows: what the run leaves behind.

A step draws no random numbers: dropout is off, the order of the text and the lengths of dense prefixes are the data's.
Where a recipe needs chance, it makes a generator from `setting.seed` and the step.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from teal_cli.adapt.followed import Followed
from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.config.recipes import RecipeOptions


@dataclass(frozen=True)
class Setting:
    """What a recipe is told about the run."""

    options: RecipeOptions
    """Its own, of `config/recipes/NAME.py`."""
    seed: int
    sparsity: float | None
    """The target; None where none was given (`--sparsity`) and the recipe does not need one."""
    lora: int
    """Rank of the adapters (`--lora`); 0: the weights themselves are trained."""
    plan: SparsityPlan | None = None
    """Rules as an export would set them at the target, where the recipe `needs_plan`."""
    say: Callable[[str], None] = lambda message: None
    """One line for the user."""


@dataclass(frozen=True)
class Stage:
    """A part of the run with an optimiser, a warm-up and a decay of its own."""

    name: str
    steps: int
    """Optimiser steps."""
    keep_best: bool = False
    """Whether the weights that do best on the held-out slice are kept, and a run that gets no better stops early.

    Not where sparsity grows during the stage: the least sparse weights would win.
    """


@dataclass(frozen=True)
class Batch:
    """What the student is about to read."""

    input_ids: Tensor
    """(batch, tokens) int64."""
    dense_prefix: Tensor
    """(batch,) int64: first positions of each row that run densely, as a prompt. What skips there too ignores it."""
    again: bool = False
    """Whether blocks run a second time, in the backward pass, because their activations are recomputed: nothing that
    they make is to be counted or kept."""


@dataclass(frozen=True)
class Progress:
    """Where the run stands."""

    stage: str
    step: int
    """Optimiser steps of this stage that are finished."""
    steps: int
    """Of this stage."""
    realised: float | None
    """Realised sparsity of the pass just run (`realised_sparsity`)."""
    accumulate: int = 1
    """Passes of an optimiser step."""

    @property
    def share_of_pass(self) -> float:
        """What one pass is of this stage."""
        return 1.0 / (self.steps * self.accumulate)


@dataclass(frozen=True)
class Outcome:
    """What a run leaves behind, beside the model's weights as they are in memory."""

    plan: SparsityPlan | None = None
    """Rules for a TEAL checkpoint; None: the folder is that of an ordinary dense model."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Entries of config.json that are new or changed (`hidden_act`, `attention_bias`)."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors to write that the source does not have (routers, biases), by key."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """For adapt.json, under the recipe's own heading: JSON values."""


@dataclass(frozen=True)
class Added:
    """What a recipe holds beside the model and what trains of it, for `adapt.memory`."""

    trained: int = 0
    """Parameters of its own that train in some stage."""
    fixed: int = 0
    """Parameters of its own that do not, in the dtype of those of the model that do not."""
    copied: int = 0
    """Numbers in float32, where the model is."""
    kept: int = 0
    """Numbers in float32, in main memory."""
    of_pass: int = 0
    """Bytes that a pass in training holds for a moment, beside its activations."""
    of_measuring: int = 0
    """The same of `measure`, when there are neither gradients nor activations."""


class Recipe(ABC):
    """One way to learn sparsity.

    Args:
        setting: of the run.
    """

    name: ClassVar[str]
    needs_plan: ClassVar[bool] = False
    """Whether it works with thresholds of a calibration: `setting.plan` is then there."""
    takes_sparsity: ClassVar[bool] = True
    """Whether `setting.sparsity` says anything to it."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.followed: Followed | None = None
        """What moves thresholds in training, where something does."""

    def check(self, model: nn.Module) -> None:  # noqa: B027  (most need nothing)
        """Refuse a model, or options, before anything is loaded or measured.

        Args:
            model: its outline: every module, on the meta device.

        Raises:
            TealError: in one line what cannot be, and what to do.
        """

    def adds(self, model: nn.Module, *, tokens: int, measured: int, itemsizes: tuple[int, int]) -> Added:
        """What it needs of memory beside the model.

        Args:
            model: its outline.
            tokens: of one pass: batch times length.
            measured: tokens that `measure` is given.
            itemsizes: bytes of a hidden state's number in training, and in `measure`.
        """
        return Added()

    def measure(self, model: nn.Module, sequences: Tensor) -> dict[str, Tensor]:
        """What `operate_` needs to know of text: clusters, signs, scales. Must leave the model as it was.

        Args:
            model: the dense model, before surgery.
            sequences: (sequences, tokens) int64, from the training text.

        Returns:
            Tensors by name; they are kept on disk as safetensors, and handed back at every resume.
        """
        return {}

    @abstractmethod
    def operate_(self, model: nn.Module, measured: Mapping[str, Tensor]) -> None:
        """Change the model into what is trained. Deterministic.

        New parameters get their starting values here. Every module path that the dense model has must still lead
        to the same parameter, since weights are written by these names; a layer may be replaced by one that holds
        its parameters.

        Args:
            model: the dense model, float32, in eval mode, on its device.
            measured: from `measure`.
        """

    def stages(self, steps: int) -> Sequence[Stage]:
        """The parts of a run of so many optimiser steps; their steps add up to it."""
        return [Stage("train", steps)]

    def begin_stage_(self, model: nn.Module, stage: Stage) -> None:  # noqa: B027
        """Change the model at the beginning of a stage (soft routers to hard ones). Deterministic, done at resume too.

        A resumed run calls it for the earlier stages as well, and loads what was trained after that: nothing here may
        be computed from trained values.
        """

    def trainable(self, model: nn.Module, stage: Stage, names: Sequence[str]) -> Sequence[str]:
        """Which parameters train in a stage.

        Args:
            model: after `begin_stage_`.
            stage: the one that begins.
            names: what trains by default, as `named_parameters` has them: the adapters with `--lora`, else all but
                the embeddings and the output layer. New parameters of the surgery are among them only without
                `--lora`: name them here.
        """
        return names

    def learning_rate(self, name: str, rate: float) -> float:
        """The learning rate of one parameter, where it is not the run's `rate`: routers may learn faster."""
        return rate

    def before_pass_(self, at: float) -> None:
        """What happens between passes in training: thresholds move. Never replayed.

        Args:
            at: share of the stage's steps that are done.
        """
        if self.followed is not None:
            self.followed.before_pass_()

    @property
    def can_replay(self) -> bool:
        """Whether passes in training may be replayed, in the stage that has begun.

        Then they launch the same kernels on the same tensors, wait for nothing, and have no `extra_loss`: what differs
        between them stands in tensors that are changed in place.
        """
        return False

    def pass_kind(self) -> Hashable:
        """What the pass in training that comes next is like: those of one kind can be replays of one another."""
        return None if self.followed is None else self.followed.kind

    def left(self) -> Any:
        """What the last pass left behind, for `realised_sparsity` and `before_pass_`.

        A replayed pass leaves what the captured one did: the same tensors, with other values.
        """
        return None if self.followed is None else self.followed.pending

    def take_left_(self, left: Any) -> None:
        """Have it as if the last pass had left this behind."""
        if self.followed is not None:
            self.followed.pending = left

    def follows(self, model: nn.Module, batch: Batch) -> AbstractContextManager[None]:
        """What `student_pass` of a recipe has around it whose thresholds follow."""
        if self.followed is None or batch.again:
            return nullcontext()
        self.followed.install_()
        return self.followed.looking(batch.input_ids.shape) if model.training else nullcontext()

    def student_pass(self, model: nn.Module, batch: Batch) -> AbstractContextManager[Any]:
        """What the student's pass runs inside; entered once more where activations are recomputed.

        Args:
            model: after surgery.
            batch: what it reads.
        """
        return nullcontext()

    def as_dense(self, model: nn.Module) -> AbstractContextManager[Any] | None:
        """Inside it, the model computes what the dense one did, given that the base weights have not been trained.

        With `--lora` (adapters are switched off around it), or where only new parameters train, it spares the copy
        that the teacher would be. None: the teacher is a copy.
        """
        return None

    @property
    def is_own_teacher(self) -> bool:
        """Whether it has an `as_dense`."""
        return type(self).as_dense is not Recipe.as_dense

    @property
    def base_is_frozen(self) -> bool:
        """Whether no parameter of the dense model trains in any stage. With `--lora` it is so by itself."""
        return False

    def extra_loss(self, progress: Progress) -> Tensor | None:
        """A further loss, from the pass just run, whose hidden states the recipe's modules have kept; 0-d, float32.

        The loop adds it to the distillation loss as it is. Called once after each pass of the student, evaluation's
        too; let go here of what was kept.
        """
        return None

    def realised_sparsity(self) -> float | None:
        """Realised sparsity of the student's last pass, as the recipe counts it."""
        return None

    def figures(self, progress: Progress) -> dict[str, float]:
        """What else to log and to keep in the curve, by name: a multiplier, a share of dead neurons."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """What must be as it was when a run resumes, beside the parameters: a running multiplier, for one."""
        return {} if self.followed is None else self.followed.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take on what `state` gave."""
        if self.followed is not None:
            self.followed.load_state(state)

    @property
    def form(self) -> int:
        """Of `state`, and of what trains: a checkpoint of another form is not resumed."""
        return 0

    @abstractmethod
    def finish_(self, model: nn.Module, sequences: Tensor) -> Outcome:
        """What the run leaves behind.

        The parameters of the dense model are written as they are after this, by its own names: undo what cannot be
        written so (absorb vectors into biases, put scales back).

        Args:
            model: with the best weights in place and adapters merged; in eval mode.
            sequences: (sequences, tokens) int64, from the training text, to set thresholds on.
        """
