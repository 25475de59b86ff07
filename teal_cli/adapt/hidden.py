"""A loss of hidden states: behind each block the student is to be where the teacher is.

Next tokens say little about single blocks, so their loss alone has noisy gradients. What a block adds to the residual
stream says much: as many numbers a token as the model is wide, at each block (FitNets, arXiv 1412.6550).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from teal_cli.models.block_calls import hidden_of, hooked
from teal_cli.models.offload import stacked

_TINY = 1e-12


@contextmanager
def hidden_states_of(blocks: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """Inside it, (batch, tokens, hidden) behind each block that has run, with its gradient."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found.append(hidden_of(output))

    with hooked([block.register_forward_hook(keep) for block in blocks]):
        yield found


def hidden_loss(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """The energy of the difference over the teacher's, a mean over tokens and blocks; 0-d float32.

    Of each token by itself: the first ones have hidden states thousands of times as large as the others'.

    Args:
        student: (batch, tokens, hidden) behind each block.
        teacher: the same of the teacher; no gradient. Either may lie on several devices, each in its own way.
    """
    return stacked(_relative(*pair) for pair in zip(student, teacher, strict=True)).mean()


def _relative(student: Tensor, teacher: Tensor) -> Tensor:
    wanted = teacher.detach().to(student.device).float()
    error = (student.float() - wanted).square().sum(-1)
    return (error / wanted.square().sum(-1).clamp_min(_TINY)).mean()
