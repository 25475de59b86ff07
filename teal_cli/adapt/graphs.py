"""Passes of training as CUDA graphs: thousands of small kernels that are launched at once.

A training step of a small model is bound by launches: SmolLM2-135M has some 8,000 of them, whatever the batch is. A
graph computes what the pass that it was captured from did, from tensors that stand where they stood.
"""

from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from teal_cli.adapt.distil import Student

_HELD = 2.2
"""How often the memory of a pass must be free for its capture: graphs keep theirs, and passes of another kind need as
much beside them."""


@dataclass(frozen=True)
class _Captured:
    """A forward and its backward."""

    graph: torch.cuda.CUDAGraph
    loss: Tensor
    left: Any
    """What the recipe had of the pass (`Recipe.left`), in tensors of the graph."""


class GraphedPasses:
    """Runs passes in training with their backward. Of each kind (`Recipe.pass_kind`) the first runs as ever, which
    also makes gradients and work spaces; the second is captured, and replayed from then on.

    Args:
        student: on a GPU, alone: gradients are summed up over no other process.
        autocast: what a forward runs in.
        share: by what a loss is multiplied for its backward: one over the passes of an optimiser step.
        say: told in one line if a model cannot be captured. Its passes then run one kernel at a time.
    """

    def __init__(
        self,
        student: Student,
        autocast: Callable[[], AbstractContextManager[Any]],
        share: float,
        say: Callable[[str], None],
    ) -> None:
        self._student, self._autocast, self._share, self._say = student, autocast, share, say
        self._captured: dict[Hashable, _Captured | None] = {}
        self._inputs: dict[str, Tensor] = {}
        self._pool = torch.cuda.graph_pool_handle()  # one for all kinds, since no two run at a time
        self._bytes = 0
        """That the first pass needed beside what was there."""
        self.works = True
        student.keeps_gradients = True

    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The loss of a batch, 0-d float32, after its gradients were added up.

        Args:
            inputs: arguments of the student, of one shape in all passes.
        """
        student = self._student
        student.forget_progress()
        if not self._inputs:
            self._inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        for name, tensor in inputs.items():
            self._inputs[name].copy_(tensor, non_blocking=True)
        kind = student.recipe.pass_kind()
        if kind not in self._captured:
            self._captured[kind] = None
            return self._pass() if self._bytes else self._measured_pass()
        captured = self._captured[kind] = self._captured[kind] or self._capture()
        if captured is None:
            return self._pass()
        captured.graph.replay()
        student.recipe.take_left_(captured.left)
        return captured.loss

    def _pass(self) -> Tensor:
        with self._autocast():
            loss = self._student.distilled(**self._inputs)
        (loss * self._share).backward()
        return loss.detach()

    def _measured_pass(self) -> Tensor:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = self._pass()
        self._bytes = max(1, torch.cuda.max_memory_allocated() - before)
        return loss

    def _capture(self) -> _Captured | None:
        """None where memory is short, or the model does what no graph can hold: it waits for the device, say."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what the pass before held is of no use to a graph, whose memory is its own
        if not any(self._captured.values()) and torch.cuda.mem_get_info()[0] < _HELD * self._bytes:
            self._give_up("graphs would need more memory than is free")
            return None
        graph = torch.cuda.CUDAGraph()
        try:
            # The outer stream is gone back to; a capture that fails stays on its own.
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
            ):
                loss = self._pass()
        except RuntimeError as error:
            # Its state still believes that a graph is being captured, and would give nobody a random number.
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            generator.graphsafe_set_state(generator.clone_state())
            self._give_up(str(error).splitlines()[0])
            return None
        return _Captured(graph, loss, self._student.recipe.left())

    def _give_up(self, why: str) -> None:
        self.works = False
        self._say(f"training launches kernels one by one, which is slower: {why}")
