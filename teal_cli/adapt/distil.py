"""The student, its teacher, and the loss between them."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teal_cli.adapt.hidden import hidden_loss, hidden_states_of
from teal_cli.adapt.logits import LogitMaker
from teal_cli.adapt.recipe import Batch, Progress, Recipe
from teal_cli.models.architectures import blocks_of
from teal_cli.models.offload import is_spread
from teal_kernels.triton_distil import distil_rows_, distils

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
    text_weight: float = 0.0,
) -> Tensor:
    """KL(teacher || student) at temperature 1, and the loss of the text itself: means over tokens, nats, 0-d float32.

    In pieces of a few tokens: the logits of all are never held. Each piece leaves its gradient at once, so that no
    logits are made a second time in the backward pass. Parameters of the output layers get none.

    Args:
        student: (tokens, hidden), what its output layer reads.
        teacher: the same of the teacher; no gradient.
        logits_of: (rows, hidden) -> (rows, vocabulary), of the student.
        teacher_logits_of: of the teacher.
        vocabulary: logits a token.
        targets: (tokens,) int64: what comes next, -1 where nothing does.
        text_weight: of the second loss, which needs them.
    """
    share = 1.0 / len(student)
    text_share = None if targets is None else (text_weight / (targets >= 0).sum()).float()

    def logits_of_both(mine: Tensor, its: Tensor) -> tuple[Tensor, Tensor]:
        ours = logits_of(mine)
        with torch.no_grad():
            return ours, teacher_logits_of(its).to(ours.device)

    def loss_of(ours: Tensor, wanted: Tensor, following: Tensor | None) -> Tensor:
        log_q, log_p = ours.float().log_softmax(-1), wanted.float().log_softmax(-1)
        loss = share * F.kl_div(log_q, log_p, log_target=True, reduction="sum")
        if following is not None and text_share is not None:
            loss = loss + text_share * F.nll_loss(log_q, following, ignore_index=-1, reduction="sum")
        return loss

    rows = max(1, logits_at_once(student.device) // vocabulary)
    pieces = -(-len(student) // rows)
    following = [None] * pieces if targets is None else targets.split(rows)
    parts = zip(student.split(rows), teacher.split(rows), following, strict=True)
    if not torch.is_grad_enabled():
        return torch.stack([loss_of(*logits_of_both(mine, its), next_ones) for mine, its, next_ones in parts]).sum()
    losses, gradients = [], []
    for mine, its, next_ones in parts:
        own = mine.detach().requires_grad_()
        ours, wanted = logits_of_both(own, its)
        if distils(ours):
            given = ours.detach().contiguous()
            loss = distil_rows_(given, wanted, share, next_ones, text_share).sum()
            upstream = given
        else:
            ours, upstream = loss_of(ours, wanted, next_ones), None
            loss = ours.detach()
        with torch.autocast(student.device.type, enabled=False):
            gradients += torch.autograd.grad(ours, own, upstream)
        losses.append(loss)
    found: Tensor = _Known.apply(student, torch.stack(losses).sum(), torch.cat(gradients))
    return found


class _Known(torch.autograd.Function):
    """A loss whose gradient is known already."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].to(gradient.dtype), None, None


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
        if is_spread(model):  # Trainer would move it to one device otherwise
            self.hf_device_map = model.hf_device_map
        self._around = (teacher, recipe, LogitMaker(model))  # in a tuple: the teacher is no submodule
        self.text_weight, self.hidden_weight = text_weight, hidden_weight
        self._blocks = [list(blocks_of(each).values()) for each in (teacher.maker.model, model)]
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
            targets = F.pad(input_ids[:, 1:], (0, 1), value=-1).flatten().to(hidden.device)
        loss = distillation_loss(
            hidden.flatten(0, 1),
            wanted.flatten(0, 1),
            maker.logits,
            teacher.maker.logits,
            maker.layer.weight.shape[0],
            targets,
            self.text_weight,
        )
        if states:
            loss = loss + self.hidden_weight * hidden_loss(states, its_states).to(loss.device)
        return loss.to(input_ids.device)
