"""What drafts cost and give: passes over several tokens, and replies to real prompts, in turn with dense decoding."""

import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from teal_cli.bench.timing import Spread
from teal_cli.decode.engine import Engine
from teal_cli.decode.loop import TokenLoop
from teal_cli.decode.paths.base import Stepper
from teal_cli.decode.sampling import Sampler, SamplingConfig
from teal_cli.decode.speculate.loop import Tally
from teal_cli.decode.speculate.speculator import Speculator
from teal_cli.decode.timing import seconds_of

SPANS = (1, 2, 4, 8)
"""Tokens of one sequence whose pass is timed."""
ACCEPTANCES = (0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
_IN_A_ROW = 4
"""Dense steps, and drafts, for which the host waits once; it waits for each pass."""
_PASSES = 15
_WARM_UP = 3


@dataclass(frozen=True)
class Costs:
    """Seconds of passes, in turn."""

    step: Spread
    """Of a dense step, as it is decoded without drafts: one of several for which the host waits once."""
    passes: dict[int, Spread]
    """Of the model that verifies, by tokens, up to what the host reads."""
    draft_step: Spread | None
    """Of the model that drafts, one of several; None where none does."""

    def gains(self, counts: Sequence[int]) -> dict[float, tuple[int, float]]:
        """Acceptance -> the number of drafted tokens that gives most, and tokens a second over dense decoding.

        Not measured, but what these costs give where each drafted token is right with that probability.
        """
        step, draft = self.step.median, 0.0 if self.draft_step is None else self.draft_step.median
        found = {}
        for share in ACCEPTANCES:
            gains = [(0, 1.0)]
            for count in counts:
                tokens = sum(share**index for index in range(count + 1))
                gains.append((count, tokens * step / (count * draft + self._of_pass(count + 1))))
            found[share] = max(gains, key=lambda pair: pair[1])
        return found

    def _of_pass(self, tokens: int) -> float:
        """Of a pass, in a line between those that were timed."""
        below = max(span for span in self.passes if span <= tokens)
        above = min(span for span in self.passes if span >= tokens)
        low, high = self.passes[below].median, self.passes[above].median
        return low if below == above else low + (high - low) * (tokens - below) / (above - below)


@dataclass(frozen=True)
class SpeculativeRun:
    """One kind of drafts."""

    drafts: str
    """As `--speculate` has it."""
    sparsity: float
    """Target of drafts; 0 where they skip nothing."""
    draft_tokens: int | None
    """Of a draft, where their number was fixed."""
    draft_bytes: int
    """That the model which drafts takes beside the one that verifies."""
    step_seconds: Spread
    """Of a dense step, in turn with the passes below."""
    pass_seconds: dict[str, Spread]
    """Of the model that verifies, by tokens of the pass."""
    draft_step_seconds: Spread | None
    expected_speedups: dict[str, dict[str, float]]
    """Acceptance -> the number of drafted tokens that pays most, and its speedup: computed from the times above."""
    acceptance: float | None
    """Of the drafted tokens up to and with the first wrong one of each pass, the share that was right, over all
    prompts; None without real prompts."""
    tokens_per_pass: float | None
    passes: dict[str, int]
    """By the number of tokens that were drafted for them."""
    tokens: int
    differing: int
    """Of them, those that are not dense decoding's at their places."""
    close: int
    """As `Tally.close`."""
    dense_tokens_per_second: Spread | None
    """Of the prompts, each once a round."""
    tokens_per_second: Spread | None
    speedup: Spread | None
    """Over dense decoding of the same prompt in the same round."""
    prompts: dict[str, dict[str, float | None]]
    """Of each prompt `acceptance`, `tokens_per_pass` and the median `speedup`."""


def real_prompts() -> dict[str, str]:
    """Kind -> text."""
    text = Path(__file__).with_name("speculation_prompts.yaml").read_text(encoding="utf-8")
    return {str(kind): str(prompt) for kind, prompt in yaml.safe_load(text).items()}


@torch.no_grad()
def measure_costs(speculator: Speculator, prompt: Tensor) -> Costs:
    """Time passes after a prompt, in turn.

    Args:
        speculator: whose models run them.
        prompt: (rows, tokens) int64.
    """
    engine, tokens = speculator.engine, prompt.shape[1]
    cache, _ = speculator.run_prompt(prompt, tokens + max(SPANS))
    target, draft = speculator.steppers_on(cache)
    ids = prompt[:, :1].to(engine.device)
    lengths = [tokens] * prompt.shape[0]

    def of_pass(stepper: Stepper, span: int) -> float:
        several = ids.expand(-1, span).contiguous()
        return seconds_of(lambda: stepper.run(several, lengths), engine.device)

    def of_step(stepper: Stepper) -> float:
        def write() -> None:
            token = ids
            for index in range(_IN_A_ROW):
                token = stepper.run(token, [length + index for length in lengths])[1].clone()

        return seconds_of(write, engine.device) / _IN_A_ROW

    works: dict[int | str, Callable[[], float]] = {span: partial(of_pass, target, span) for span in SPANS}
    works["step"] = partial(of_step, target)
    if draft is not None:
        works["draft"] = partial(of_step, draft)
    seconds: dict[int | str, list[float]] = {name: [] for name in works}
    for index in range(_WARM_UP + _PASSES):
        for name, work in works.items():
            found = work()
            if index >= _WARM_UP:
                seconds[name].append(found)
    spreads = {name: Spread.of(values) for name, values in seconds.items()}
    return Costs(spreads["step"], {span: spreads[span] for span in SPANS}, spreads.get("draft"))


@dataclass
class Rounds:
    """What replies to real prompts gave, prompt by prompt and round by round."""

    dense: list[float]
    speeds: list[float]
    ratios: dict[str, list[float]]
    tallies: dict[str, Tally]
    differing: int = 0

    @classmethod
    def empty(cls) -> "Rounds":
        """Before the first."""
        return cls([], [], {}, {})

    @property
    def whole(self) -> Tally:
        """Of all prompts."""
        found = Tally()
        for tally in self.tallies.values():
            for name in ("passes", "tokens", "drafted", "judged", "accepted", "close"):
                setattr(found, name, getattr(found, name) + getattr(tally, name))
            found.counts.update(tally.counts)
        return found


class DenseReplies:
    """Greedy dense tokens after prompts, and what they took; on a GPU in one cache, with one graph."""

    def __init__(self, engine: Engine, positions: int) -> None:
        self._engine, self._positions = engine, positions
        self._cache: Any = None

    def write(self, prompt: Tensor, new_tokens: int) -> tuple[list[int], float]:
        """Tokens, and seconds from the first one to the last."""
        engine, control = self._engine, self._engine.control
        with control.switched_off() if control else nullcontext():
            cache = engine.new_cache(self._positions)
            sampler = Sampler(SamplingConfig(), engine.device)
            token = sampler.next_token(engine.prefill(prompt.to(engine.device), cache))
            loop = TokenLoop(engine, cache, token, sampler)
            found = [token.clone()]
            for _ in range(TokenLoop.first_steps(engine)):
                found.append(loop.advance().clone())
            rest = new_tokens - len(found)
            seconds = seconds_of(lambda: found.extend(loop.advance().clone() for _ in range(rest)), engine.device)
            return torch.cat(found, 1)[0].tolist(), seconds / rest


@torch.no_grad()
def speculative_reply(
    speculator: Speculator, cache: Any, logits: Tensor, prompt: Tensor, new_tokens: int
) -> tuple[list[int], float]:
    """Greedy tokens after a prompt that a cache holds, and seconds a token behind the first."""
    engine = speculator.engine
    sampler = Sampler(SamplingConfig(), engine.device)
    token = sampler.next_token(logits)
    loop = speculator.loop(cache, prompt, token, sampler, positions=prompt.shape[1] + new_tokens)
    found: list[int] = token[0].tolist()

    def write() -> None:
        while len(found) < new_tokens:
            found.extend(loop.advance()[0])

    seconds = seconds_of(write, engine.device)
    return found[:new_tokens], seconds / (new_tokens - 1)


def write_replies(
    dense: DenseReplies,
    speculator: Speculator,
    kind: str,
    prompt: Tensor,
    new_tokens: int,
    positions: int,
    rounds: Rounds,
) -> None:
    """Write one reply densely and one from drafts, and note both; `positions`: of the longest prompt and its reply."""
    wanted, dense_seconds = dense.write(prompt, new_tokens)
    cache, logits = speculator.run_prompt(prompt, positions)
    tally = speculator.tally = Tally()
    found, seconds = speculative_reply(speculator, cache, logits, prompt, new_tokens)
    rounds.tallies[kind] = tally
    rounds.differing += sum(own != other for own, other in zip(found, wanted, strict=True))
    rounds.dense.append(1 / dense_seconds)
    rounds.speeds.append(1 / seconds)
    rounds.ratios.setdefault(kind, []).append(dense_seconds / seconds)


def run_of(
    drafts: str, sparsity: float, speculator: Speculator, draft_bytes: int, costs: Costs, rounds: Rounds
) -> SpeculativeRun:
    """All of it as a result."""
    whole = rounds.whole
    ratios = [ratio for own in rounds.ratios.values() for ratio in own]
    return SpeculativeRun(
        drafts=drafts,
        sparsity=sparsity,
        draft_tokens=speculator.count,
        draft_bytes=draft_bytes,
        step_seconds=costs.step,
        pass_seconds={str(span): spread for span, spread in costs.passes.items()},
        draft_step_seconds=costs.draft_step,
        expected_speedups={
            str(share): {"draft_tokens": count, "speedup": gain}
            for share, (count, gain) in costs.gains(range(1, max(SPANS))).items()
        },
        acceptance=whole.acceptance,
        tokens_per_pass=whole.tokens_per_pass,
        passes={str(count): passes for count, passes in sorted(whole.counts.items())},
        tokens=whole.tokens,
        differing=rounds.differing,
        close=whole.close,
        dense_tokens_per_second=Spread.of(rounds.dense) if rounds.dense else None,
        tokens_per_second=Spread.of(rounds.speeds) if rounds.speeds else None,
        speedup=Spread.of(ratios) if ratios else None,
        prompts={
            kind: {
                "acceptance": tally.acceptance,
                "tokens_per_pass": tally.tokens_per_pass,
                "speedup": statistics.median(rounds.ratios[kind]),
            }
            for kind, tally in rounds.tallies.items()
        },
    )
