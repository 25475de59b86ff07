"""Sparse or dense: where sparse layers can be slower than dense ones, both are timed, and the faster decodes.

Transformers' forward calls each layer by itself. A sparse layer then has costs that a dense one has not (of a mixture
of experts: a launch for each expert), and may lose: on an H200 at 50 %, 0.33 of the dense speed for the shapes of
Qwen3-MoE and 0.44 for Gemma 3 (issue 22).
"""

import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from teal_cli.decode.loop import TokenLoop
from teal_cli.decode.paths.base import Decoder
from teal_cli.decode.sampling import Sampler, SamplingConfig
from teal_cli.decode.timing import seconds_of
from teal_cli.sparse import sparse_layers
from teal_kernels import resolve_backend

LEAST_BYTES = 64 << 20
"""Weights of all projections from which on times are taken. Smaller models say nothing: calls take the time there."""
PROMPT = 12
"""Tokens of the prompt that are used."""
REPEATS = 5
"""Steps of each that are timed, in turn."""
NOISE = 1.05
"""Sparse is slower only by more than this: medians of few steps are apart by some per cent on a busy machine."""


@dataclass(frozen=True)
class Choice:
    """Which of the two decodes."""

    decodes: Literal["sparse", "dense"]
    backend: str = ""
    """That runs sparse layers."""
    sparse_seconds: float | None = None
    """Median of a step; None where nothing was measured."""
    dense_seconds: float | None = None

    @property
    def line(self) -> str | None:
        """What a user is told; None where it is no surprise."""
        if self.decodes == "sparse" or self.sparse_seconds is None or self.dense_seconds is None:
            return None
        sparse, dense = (_milliseconds(seconds) for seconds in (self.sparse_seconds, self.dense_seconds))
        return (
            f"sparse decoding took {sparse} ms a token, dense {dense}: decoding dense "
            f"(--backend {self.backend} decodes sparse all the same)"
        )


def _milliseconds(seconds: float) -> str:
    """With three digits."""
    return f"{seconds * 1e3:.3g}" if seconds < 0.9995 else f"{seconds * 1e3:.0f}"


def choose(engine: Decoder, prompt: Tensor) -> Choice:
    """Time sparse and dense steps in turn, where that says something; the faster one is the choice.

    Nothing is counted, and no random number is drawn.

    Args:
        engine: with the plan that is going to be decoded.
        prompt: (rows, tokens) int64; its first tokens are enough.
    """
    control = engine.control
    if control is None or not control.decodes_sparse:
        return Choice("dense")
    bytes_of_weights = sum(layer.storage.nbytes for layer in sparse_layers(engine.model).values())
    steps = _warm_up(engine) + REPEATS
    ids = prompt[:, :PROMPT].to(engine.device)
    too_long = ids.shape[1] + steps > engine.max_length
    if not engine.path.sparse_may_lose or not engine.path.keeps_state or bytes_of_weights < LEAST_BYTES or too_long:
        return Choice("sparse")
    times: dict[str, list[float]] = {"dense": [], "sparse": []}
    with control.uncounted():
        ways: dict[str, Callable[[], AbstractContextManager[None]]] = {
            "dense": control.switched_off,
            "sparse": nullcontext,
        }
        loops = {way: _loop(engine, ids, steps) for way in ways}
        for step in range(steps):
            for way, switched in ways.items():
                with switched():
                    seconds = seconds_of(loops[way].advance, engine.device)
                if step >= _warm_up(engine):
                    times[way].append(seconds)
    medians = {way: statistics.median(found) for way, found in times.items()}
    slower = medians["sparse"] > NOISE * medians["dense"]
    backend = resolve_backend(control.backend, engine.device, engine.model.dtype)
    return Choice("dense" if slower else "sparse", backend, medians["sparse"], medians["dense"])


def _warm_up(engine: Decoder) -> int:
    """Steps that are not timed: those that compile and capture, and one more."""
    return TokenLoop.first_steps(engine) + 1


def _loop(engine: Decoder, ids: Tensor, steps: int) -> TokenLoop:
    cache = engine.new_cache(ids.shape[1] + steps)
    sampler = Sampler(SamplingConfig(), engine.device)
    return TokenLoop(engine, cache, sampler.next_token(engine.prefill(ids, cache)), sampler)
