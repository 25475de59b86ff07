"""Sparse or dense, compiled or not: where one can be slower than the other, both are timed, and the faster decodes.

Transformers' forward calls each layer by itself. A sparse layer then has costs that a dense one has not (of a mixture
of experts: a launch for each expert), and may lose: on an H200 at 50 %, 0.33 of the dense speed for the shapes of
Qwen3-MoE and 0.44 for Gemma 3 (issue 22). Compiled by torch.compile, with a static cache, either may be faster still
(issue 24); where that is tried, `compiling.Compiling` says. On the fused
path tile configs were chosen for larger models: on an H200 SmolLM2-135M, after `teal adapt --recipe recover`, has 0.97
of the dense speed.
"""

import statistics
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from teal_cli.decode.deadline import OutOfTimeError, can_stop, deadline
from teal_cli.decode.loop import TokenLoop
from teal_cli.decode.paths.base import Decoder
from teal_cli.decode.probe import TOLERANCE, difference
from teal_cli.decode.sampling import Sampler, SamplingConfig
from teal_cli.decode.timing import seconds_of
from teal_cli.errors import MachineError, shortened
from teal_cli.ranks.group import slowest
from teal_cli.sparse import sparse_layers
from teal_kernels import resolve_backend

LEAST_BYTES = 64 << 20
"""Weights of all projections from which on times are taken. Smaller models say nothing: calls take the time there."""
PROMPT = 12
"""Tokens of the prompt that are used."""
REPEATS, REPLAYS = 5, 15
"""Steps of each that are timed, in turn; more of those that are a graph of our own kernels, which are short."""
NOISE, NOISE_OF_REPLAYS = 1.05, 1.02
"""Sparse is slower only by more than this: medians of few steps are apart by some per cent on a busy machine."""

_LONGEST_REASON = 200

Kind = Literal["sparse", "dense"]


@dataclass(frozen=True)
class Forms:
    """A kind of step, as it is and compiled."""

    kind: Kind
    plain_seconds: float
    """Median of a step."""
    compiled_seconds: float | None = None
    """None where it was not compiled."""
    because: str | None = None
    """Why not; None where it would not pay, too."""
    always: bool = False
    """Whether compiled steps are taken whatever their time."""

    @property
    def compiled(self) -> bool:
        """Whether the compiled form is the one to take."""
        return self.compiled_seconds is not None and (self.always or self.compiled_seconds < self.plain_seconds)

    @property
    def seconds(self) -> float:
        """Of the form to take."""
        return self.plain_seconds if self.compiled_seconds is None or not self.compiled else self.compiled_seconds

    @property
    def measured(self) -> dict[str, float | None] | None:
        """What results say of it; None where nothing was compiled or tried."""
        if self.compiled_seconds is None and self.because is None:
            return None
        return {"plain": self.plain_seconds, "compiled": self.compiled_seconds}

    @property
    def line(self) -> str | None:
        """What a user is told; None where nothing was compiled or tried."""
        if self.because is not None:
            return f"{self.kind} steps are not compiled: {self.because}"
        if self.compiled_seconds is None:
            return None
        compiled, plain = (_milliseconds(seconds) for seconds in (self.compiled_seconds, self.plain_seconds))
        taken = "compiled" if self.compiled else "as it is"
        return f"a {self.kind} step took {compiled} ms compiled (torch.compile), {plain} as it is: decoding {taken}"


@dataclass(frozen=True)
class Choice:
    """Which of them decodes."""

    decodes: Kind
    backend: str = ""
    """That runs sparse layers."""
    sparse_seconds: float | None = None
    """Median of a step, in the faster form; None where nothing was measured."""
    dense_seconds: float | None = None
    forms: tuple[Forms, ...] = ()
    """Of the kinds of step that were to be compiled."""

    def form(self, kind: Kind) -> Forms | None:
        """Of a kind of step; None where it was not to be compiled."""
        return next((form for form in self.forms if form.kind == kind), None)

    def compiles(self, kind: Kind) -> bool:
        """Whether steps of a kind are compiled."""
        form = self.form(kind)
        return form is not None and form.compiled

    @property
    def compiled(self) -> bool:
        """Whether what decodes is compiled."""
        return self.compiles(self.decodes)

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

    @property
    def lines(self) -> list[str]:
        """All that a user is told."""
        return [line for line in (*(form.line for form in self.forms), self.line) if line is not None]


def _milliseconds(seconds: float) -> str:
    """With three digits."""
    return f"{seconds * 1e3:.3g}" if seconds < 0.9995 else f"{seconds * 1e3:.0f}"


def choose(engine: Decoder, prompt: Tensor, positions: int = 0, dense: Forms | None = None) -> Choice:
    """Time sparse and dense steps in turn, compiled ones too, where that says something; the fastest is the choice.

    Nothing is counted, and no random number is drawn.

    Args:
        engine: with the plan that is going to be decoded.
        prompt: (rows, tokens) int64; its first tokens are enough.
        positions: that the cache is going to have, for which compiled steps are made.
        dense: what another plan's measurement found of dense steps, which are the same for all.

    Raises:
        MachineError: compiled steps were asked for by name, and there are none.
    """
    control, compiling = engine.control, engine.compiling
    sparse = control is not None and control.decodes_sparse
    replays = engine.path.own_kernels and engine.device.type == "cuda"
    steps = _warm_up(engine) + (REPLAYS if replays else REPEATS)
    ids = prompt[:, :PROMPT].to(engine.device)
    fits = engine.path.keeps_state and ids.shape[1] + steps <= engine.max_length
    worthwhile = fits and slowest(engine.model, _bytes_of_weights(engine.model)) >= LEAST_BYTES  # of all ranks alike
    may_lose = sparse and engine.never_worse
    kinds: list[Kind] = ["dense", "sparse"] if may_lose and worthwhile else ["sparse" if sparse else "dense"]
    tries = compiling.is_tried and fits and (worthwhile or compiling.when == "always") and not engine.path.own_kernels
    if compiling.when == "always" and not fits and not engine.path.own_kernels:
        raise _not_compiled("its context is too short to try, or it keeps no state")
    if len(kinds) == 1 and not tries:
        return Choice(kinds[0])
    trial = _Trial(engine, ids, steps)
    forms: list[Forms] = []
    with control.uncounted() if control else nullcontext():
        plain = trial.seconds({kind: trial.loop(kind) for kind in kinds})
        if tries:
            # For one reply a single compilation is dear enough: that of the kind which is faster as it is.
            in_question = kinds if compiling.for_its_speed else [min(kinds, key=plain.__getitem__)]
            length = max(positions, ids.shape[1] + steps)
            forms = [
                dense if kind == "dense" and dense is not None else _form(trial, kind, plain[kind], length)
                for kind in in_question
            ]
    if forms and compiling.when == "always" and not any(form.compiled for form in forms):
        raise _not_compiled("; ".join(form.because or "" for form in forms))
    best: dict[Kind, float] = plain | {form.kind: form.seconds for form in forms}
    backend = resolve_backend(control.backend, engine.device, engine.model.dtype) if control and sparse else ""
    if len(kinds) == 1:
        return Choice(kinds[0], backend, best.get("sparse"), best.get("dense"), tuple(forms))
    slower = best["sparse"] > (NOISE_OF_REPLAYS if replays else NOISE) * best["dense"]
    return Choice("dense" if slower else "sparse", backend, best["sparse"], best["dense"], tuple(forms))


def _not_compiled(because: str) -> MachineError:
    return MachineError(f"compile always (flag --compile): steps are not compiled: {because}; use --compile auto")


class _Trial:
    """Loops from the same prompt that are timed."""

    def __init__(self, engine: Decoder, ids: Tensor, steps: int) -> None:
        self.engine, self.ids, self.steps = engine, ids, steps

    def as_kind(self, kind: Kind) -> AbstractContextManager[None]:
        """Dense or sparse inside the block."""
        control = self.engine.control
        return control.switched_off() if control is not None and kind == "dense" else nullcontext()

    def loop(self, kind: Kind, positions: int = 0, *, compiled: bool = False) -> TokenLoop:
        """A loop after the prompt, with a cache for so many positions, or as many as are needed."""
        engine = self.engine
        with self.as_kind(kind):
            cache = engine.new_cache(positions or self.ids.shape[1] + self.steps, compiled)
            sampler = Sampler(SamplingConfig(), engine.device)
            return TokenLoop(engine, cache, sampler.next_token(engine.prefill(self.ids, cache)), sampler)

    def seconds(self, loops: dict[Kind, TokenLoop]) -> dict[Kind, float]:
        """Medians of their steps, which are taken in turn."""
        times: dict[Kind, list[float]] = {kind: [] for kind in loops}
        for step in range(self.steps):
            for kind, loop in loops.items():
                with self.as_kind(kind):
                    seconds = seconds_of(loop.advance, self.engine.device)
                if step >= _warm_up(self.engine):
                    times[kind].append(seconds)
        return {kind: slowest(self.engine.model, statistics.median(found)) for kind, found in times.items()}


def _form(trial: _Trial, kind: Kind, plain_seconds: float, positions: int) -> Forms:
    """Compile a kind of step, make sure of what it gives, and time it in turn with the form that is there.

    Whatever torch raises is a reason not to.
    """
    engine, compiling = trial.engine, trial.engine.compiling
    with trial.as_kind(kind):
        because = engine.path.not_compiled_because(positions)
    if because is None and not compiling.pays(plain_seconds, engine.device):
        return Forms(kind, plain_seconds)
    if because is None and compiling.seconds is not None and not can_stop():
        because = "nobody could give it up (not the main thread, or an alarm is in use)"
    if because is not None:
        return Forms(kind, plain_seconds, because=because)
    try:
        beside, loop = trial.loop(kind, positions), trial.loop(kind, positions, compiled=True)
        because = _differs(trial, kind, loop, beside)
        if because is None:
            plain, compiled = _in_turn(trial, kind, loop, beside)
            return Forms(kind, plain, compiled, always=compiling.when == "always")
    except Exception as error:
        because = str(error) if isinstance(error, OutOfTimeError) else _root(error)
        if engine.device.type == "cuda":
            torch.cuda.empty_cache()
    return Forms(kind, plain_seconds, because=because)


def _root(error: BaseException) -> str:
    """What went wrong first, in one line: torch wraps it several times."""
    while (inner := getattr(error, "inner_exception", None) or error.__cause__) is not None:
        error = inner
    said = str(error).strip().splitlines()
    return shortened(": ".join([type(error).__name__, *said[:1]]), _LONGEST_REASON)


def _differs(trial: _Trial, kind: Kind, compiled: TokenLoop, plain: TokenLoop) -> str | None:
    """Take the first steps of both, which compile and capture; a reason where their logits are not the same.

    Raises:
        OutOfTimeError: the first one, which compiles, took longer than it may.
    """
    engine = trial.engine
    errors = []
    for step in range(_warm_up(engine) + 1):
        with trial.as_kind(kind):
            token = plain.advance()
            with warnings.catch_warnings(), deadline(engine.compiling.seconds if step == 0 else None):
                warnings.simplefilter("ignore")  # of torch's compiler, about transformers' code
                compiled.advance()
        errors.append(difference(compiled.logits, plain.logits).max())
        compiled.take(token)
    error = float(torch.stack(errors).median())
    if error <= TOLERANCE[kind == "sparse"][engine.model.dtype]:
        return None
    return f"their logits differ from those of other steps by {error:.0%}"


def _in_turn(trial: _Trial, kind: Kind, compiled: TokenLoop, plain: TokenLoop) -> tuple[float, float]:
    """Medians of a step as it is, and compiled."""
    times: list[tuple[float, float]] = []
    device = trial.engine.device
    with trial.as_kind(kind):
        for _ in range(trial.steps - _warm_up(trial.engine) - 1):
            times.append((seconds_of(plain.advance, device), seconds_of(compiled.advance, device)))
    medians = [statistics.median(column) for column in zip(*times, strict=True)]
    return medians[0], medians[1]


def _warm_up(engine: Decoder) -> int:
    """Steps that are not timed: those that compile and capture, and one more."""
    return TokenLoop.first_steps(engine) + 1


def _bytes_of_weights(model: nn.Module) -> int:
    """Of all projections; of a model without sparse layers, all that it has."""
    layers = sparse_layers(model).values()
    return sum(layer.storage.nbytes for layer in layers) or sum(p.nbytes for p in model.parameters())
