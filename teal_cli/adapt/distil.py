"""The student, its teacher, and the loss between them."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from teal_cli.adapt.hidden import blocks_of, hidden_loss, hidden_states_of
from teal_cli.adapt.logits import LogitMaker
from teal_cli.adapt.recipe import Batch, Progress, Recipe

_LOGITS_AT_ONCE = {"cpu": 1 << 24, "cuda": 1 << 26}
"""Of one piece: 64 MiB in float32, of which a loss holds about four. On a GPU each piece costs launches."""


def logits_at_once(device: torch.device | str) -> int:
    """How many logits a piece of the loss makes on a device."""
    return _LOGITS_AT_ONCE.get(torch.device(device).type, _LOGITS_AT_ONCE["cpu"])


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    logits_of: Callable[[Tensor], Tensor],
    teacher_logits_of: Callable[[Tensor], Tensor],
    vocabulary: int,
    targets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) at temperature 1, and the loss of the text itself: a mean over tokens, in nats.

    In pieces of a few tokens, whose logits are made again in the backward pass: those of all are never held.

    Args:
        student: (tokens, hidden), what its output layer reads.
        teacher: the same of the teacher; no gradient.
        logits_of: (rows, hidden) -> (rows, vocabulary), of the student.
        teacher_logits_of: of the teacher.
        vocabulary: logits a token.
        targets: (tokens,) int64: what comes next, -1 where nothing does; None leaves the second loss out (0).
    """

    def piece(mine: Tensor, its: Tensor, following: Tensor | None) -> tuple[Tensor, Tensor]:
        ours = logits_of(mine).float().log_softmax(-1)
        with torch.no_grad():
            wanted = teacher_logits_of(its).float().log_softmax(-1)
        kl = F.kl_div(ours, wanted, log_target=True, reduction="sum")
        if following is None:
            return kl, kl.new_zeros(())
        return kl, F.nll_loss(ours, following, ignore_index=-1, reduction="sum")

    rows = max(1, logits_at_once(student.device) // vocabulary)
    pieces = zip(
        student.split(rows),
        teacher.split(rows),
        targets.split(rows) if targets is not None else [None] * -(-len(student) // rows),
        strict=True,
    )
    kl, text = student.new_zeros((), dtype=torch.float32), student.new_zeros((), dtype=torch.float32)
    made_again: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    for each in pieces:
        one_kl, one_text = checkpoint(piece, *each, **made_again) if torch.is_grad_enabled() else piece(*each)
        kl, text = kl + one_kl, text + one_text
    return kl / len(student), text / (len(student) if targets is None else (targets >= 0).sum())


class Teacher:
    """The dense model that the student is to be like.

    Args:
        model: a frozen copy, or the student itself.
        as_dense: inside what the student computes what the dense model did; None with a copy.
    """

    def __init__(self, model: Any, as_dense: Callable[[], AbstractContextManager[Any]] | None = None) -> None:
        self.maker = LogitMaker(model)
        self._as_dense = as_dense

    @torch.no_grad()
    def hidden_states(self, ids: Tensor) -> Tensor:
        """(batch, tokens) int64 -> (batch, tokens, hidden): what its output layer reads."""
        if self._as_dense is None:
            return self.maker.hidden_states(ids)
        with self._as_dense():
            return self.maker.hidden_states(ids)


class Student(nn.Module):
    """The model in training, whose forward is the loss: so that whatever wraps it sees the whole pass.

    Args:
        model: after surgery.
        teacher: not a part of this module.
        recipe: adds its own loss.
        text_weight: of the loss of the text itself, beside the distillation.
        hidden_weight: in training, of the loss of hidden states.
    """

    accepts_loss_kwargs = False

    def __init__(
        self, model: Any, teacher: Teacher, recipe: Recipe, text_weight: float = 0.0, hidden_weight: float = 0.0
    ) -> None:
        super().__init__()
        self.model = model
        self._no_split_modules = getattr(model, "_no_split_modules", None)
        self._around = (teacher, recipe, LogitMaker(model))  # in a tuple: the teacher is no submodule
        self.text_weight, self.hidden_weight = text_weight, hidden_weight
        self._blocks = blocks_of(teacher.maker.model), blocks_of(model)
        self.at = ("", 0, 1)
        """Stage, step and steps, for the recipe's loss."""
        self.accumulate = 1
        """Passes of an optimiser step."""
        self.keeps_gradients = False
        """Whether gradients are set to zero, not let go of: captured passes add to them where they are."""
        self._progress: Progress | None = None
        self._batch: Batch | None = None

    @property
    def recipe(self) -> Recipe:
        """Whose loss is added."""
        return self._around[1]

    @property
    def progress(self) -> Progress:
        """Of the pass just run; the first to ask waits for it."""
        if self._progress is None:
            self._progress = Progress(*self.at, self.recipe.realised_sparsity(), self.accumulate)
        return self._progress

    def forget_progress(self) -> None:
        """A pass begins: the next to ask is told of it."""
        self._progress = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """See `keeps_gradients`."""
        super().zero_grad(set_to_none and not self.keeps_gradients)

    def around_recomputed(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """What a block runs inside whose activations are recomputed: the first time, and in the backward pass."""
        assert self._batch is not None  # noqa: S101  (blocks run in a forward)
        return nullcontext(), self.recipe.student_pass(self.model, replace(self._batch, again=True))

    def forward(self, input_ids: Tensor, dense_prefix: Tensor) -> tuple[Tensor]:
        """The loss of a batch, 0-d float32, in a tuple as Trainer takes it.

        Args:
            input_ids: (batch, tokens) int64.
            dense_prefix: (batch,) int64 positions that run dense.
        """
        self.forget_progress()
        loss = self.distilled(input_ids, dense_prefix)
        extra = self.recipe.extra_loss(self.progress)
        return (loss if extra is None or not self.training else loss + extra,)

    def distilled(self, input_ids: Tensor, dense_prefix: Tensor) -> Tensor:
        """The loss without what the recipe adds."""
        teacher, recipe, maker = self._around
        self._batch = Batch(input_ids, dense_prefix)
        its_blocks, blocks = self._blocks if self.hidden_weight and self.training else ([], [])
        with hidden_states_of(its_blocks) as its_states:
            wanted = teacher.hidden_states(input_ids)  # perhaps of this very model, whose blocks then ask for the batch
        with recipe.student_pass(self.model, self._batch), hidden_states_of(blocks) as states:
            hidden = maker.hidden_states(input_ids)
        targets = None
        if self.text_weight:
            targets = F.pad(input_ids[:, 1:], (0, 1), value=-1).flatten()
        kl, text = distillation_loss(
            hidden.flatten(0, 1),
            wanted.flatten(0, 1),
            maker.logits,
            teacher.maker.logits,
            maker.layer.weight.shape[0],
            targets,
        )
        loss = kl + self.text_weight * text if self.text_weight else kl
        return loss + self.hidden_weight * hidden_loss(states, its_states) if states else loss
