"""Steps of transformers' forward, compiled by torch.compile: how, and when that is tried.

What a user of transformers would take instead is a static cache and a compiled step; the general path has to offer it.

The whole forward is compiled, as one graph, not block by block. torch specialises code on the index by which a block
finds its keys and values, so that blocks share nothing of a compiled block; and one graph fuses a block's last sum with
the next block's norm. Nothing is gained by a partial graph: a forward that has none is decoded as it is.

torch's own CUDA graphs ("reduce-overhead") are left off: `TokenLoop` captures the step together with its sampling,
so that neither Python nor torch's checks before a compiled call are part of a token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor

LIMIT_SECONDS = 180.0
"""After which `auto` gives a compilation up. On an H200 they took 10 to 130 s (issue 24)."""
_EXPECTED_SECONDS = 60.0
_SAVED = {"cuda": 0.4, "cpu": 0.1}
"""Of a token's time. On an H200 transformers' compiled steps took 0.65 of the time of ours as they were (Phi-4-mini,
issue 24), on a Zen core 0.9 (GPT-NeoX, Qwen3-MoE and Jamba, 20 to 60 MB)."""
_LEAST_POSITIONS = 256
_MOST_DOUBLED = 4096


@dataclass(frozen=True)
class Compiling:
    """Whether steps are compiled: `auto` where it pays and is faster, by measurement; `always`; `never`."""

    when: Literal["auto", "always", "never"] = "never"
    tokens: int | None = None
    """How many are going to be decoded; None where their speed is what is wanted, whatever it costs."""

    @property
    def is_tried(self) -> bool:
        """Whether it may be."""
        return self.when != "never"

    @property
    def for_its_speed(self) -> bool:
        """Whether compiled steps are wanted whatever they cost, so that all kinds are compiled."""
        return self.when == "always" or self.tokens is None

    @property
    def seconds(self) -> float | None:
        """After which it is given up; None for never."""
        return LIMIT_SECONDS if self.when == "auto" else None

    def pays(self, step_seconds: float, device: torch.device) -> bool:
        """Whether a compilation can be worth its time, where a step takes so long without it."""
        saved = (self.tokens or 0) * step_seconds * _SAVED.get(device.type, 0.0)
        return self.for_its_speed or saved > _EXPECTED_SECONDS


def compiled_positions(length: int) -> int:
    """Positions of a cache for compiled steps that is to hold `length`.

    Code is compiled for one number of positions: few numbers, so that the replies of a conversation share it. A step
    reads them all, which are little beside the weights.
    """
    if length > _MOST_DOUBLED:
        return -(-length // _MOST_DOUBLED) * _MOST_DOUBLED
    return max(_LEAST_POSITIONS, 1 << (length - 1).bit_length())


def _logits(model: Any, input_ids: Tensor, arguments: dict[str, Any]) -> Tensor:
    """(rows, 1) int64 -> (rows, 1, vocabulary)."""
    logits: Tensor = model(input_ids=input_ids, use_cache=True, logits_to_keep=1, **arguments).logits
    return logits


class CompiledSteps:
    """The compiled steps of one model, one for each kind: sparse or dense, rows, positions.

    torch looks compiled code up by the Python code that it was made from, and gives up after few versions. Each kind
    has a copy of that code for itself, so that one never costs another its place.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._steps: dict[Any, Callable[..., Tensor]] = {}

    def logits(self, kind: Any, input_ids: Tensor, arguments: dict[str, Any]) -> Tensor:
        """A step. The first one of a kind compiles, which raises whatever torch has to say.

        Args:
            kind: anything hashable that changes with the code.
            input_ids: (rows, 1) int64.
            arguments: of the forward, besides.

        Returns:
            (rows, 1, vocabulary)
        """
        if kind not in self._steps:
            own = FunctionType(_logits.__code__.replace(), _logits.__globals__)
            self._steps[kind] = torch.compile(own, fullgraph=True, dynamic=False)
        return self._steps[kind](self._model, input_ids, arguments)
