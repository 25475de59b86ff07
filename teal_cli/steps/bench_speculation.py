"""The part of bench that measures speculation: what drafts cost, and what they give on real prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from teal_cli.bench.speculation import (
    SPANS,
    DenseReplies,
    Rounds,
    SpeculativeRun,
    measure_costs,
    real_prompts,
    run_of,
    write_replies,
)
from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.config import BenchConfig
from teal_cli.console import Reporter
from teal_cli.decode.chat import encode_prompt, wants_chat
from teal_cli.decode.engine import Engine
from teal_cli.decode.speculate.speculator import Speculator
from teal_cli.errors import ArtefactError
from teal_cli.sparse import apply_plan_
from teal_cli.speculation import Speculation
from teal_cli.steps.drafts import Copies, speculator_for


@dataclass
class _Setting:
    """One kind of drafts at one sparsity."""

    drafts: Speculation
    plan: SparsityPlan | None
    speculator: Speculator
    draft_bytes: int
    rounds: Rounds

    def use(self) -> None:
        """Have the layers of the model that drafts skip inputs by the plan."""
        if self.plan is not None:
            apply_plan_(self.speculator.draft, self.plan)


def encoded_prompts(tokenizer: Any) -> dict[str, Tensor]:
    """Kind -> (1, tokens) int64, by the model's chat template where it has one."""
    chat = wants_chat(tokenizer, None)
    return {
        kind: encode_prompt(tokenizer, [{"role": "user", "content": text}], chat)
        for kind, text in real_prompts().items()
    }


def check_prompts(config: BenchConfig, context: int, prompts: Mapping[str, Tensor]) -> None:
    """Fail before anything is measured where the model's context cannot hold what is going to be.

    Args:
        config: of bench.
        context: positions of the model that verifies.
        prompts: as `bench_speculation` takes them.

    Raises:
        ArtefactError: more positions than the model has.
    """
    works = [("timed passes", config.prompt_tokens, max(SPANS), "--prompt-tokens")]
    works += [
        (f"the real prompt {kind!r}", ids.shape[1], config.new_tokens, "--new-tokens") for kind, ids in prompts.items()
    ]
    for work, before, new, flag in works:
        if before + new > context:
            raise ArtefactError(
                f"{work}: {before} prompt tokens and {new} new ones exceed the model's context of {context}: "
                f"lower {flag}, or leave out --speculate"
            )


def bench_speculation(
    config: BenchConfig,
    engine: Engine,
    plans: Sequence[SparsityPlan],
    prompt: Tensor,
    prompts: Mapping[str, Tensor],
    reporter: Reporter,
) -> list[SpeculativeRun]:
    """Measure every kind of drafts, sparse ones at every plan.

    Args:
        config: of bench.
        engine: of the model that verifies.
        plans: sparsities of sparse drafts.
        prompt: (rows, tokens) int64, behind which passes are timed.
        prompts: kind -> (1, tokens) int64 that replies are written to, in turn with dense decoding; none of a model
            with random weights, whose text says nothing.
        reporter: told what is done.

    Raises:
        TealError: a model that cannot be decoded speculatively.
    """
    copies: Copies = {}
    settings = []
    for drafts in config.speculate:
        for plan in plans if drafts.sparse else [None]:
            speculator, taken = speculator_for(engine, drafts, config.draft_tokens, reporter, copies)
            settings.append(_Setting(drafts, plan, speculator, taken, Rounds.empty()))
    costs = []
    for setting in settings:
        setting.use()
        costs.append(measure_costs(setting.speculator, prompt))
    if prompts:
        _write(config, engine, settings, prompts, reporter)
    return [
        run_of(
            str(setting.drafts),
            0.0 if setting.plan is None else setting.plan.target_sparsity,
            setting.speculator,
            setting.draft_bytes,
            cost,
            setting.rounds,
        )
        for setting, cost in zip(settings, costs, strict=True)
    ]


def _write(
    config: BenchConfig,
    engine: Engine,
    settings: Sequence[_Setting],
    prompts: Mapping[str, Tensor],
    reporter: Reporter,
) -> None:
    """Reply to each prompt once a round, densely and from each kind of drafts."""
    positions = max(ids.shape[1] for ids in prompts.values()) + config.new_tokens
    dense = DenseReplies(engine, positions)
    first = next(iter(prompts))
    total = (config.repeats * len(prompts) + 1) * len(settings)
    with reporter.progress("replying", total) as advance:
        for setting in settings:
            setting.use()
            write_replies(
                dense, setting.speculator, first, prompts[first], config.new_tokens, positions, Rounds.empty()
            )
            advance(1)
        for _ in range(config.repeats):
            for kind, ids in prompts.items():
                for setting in settings:
                    setting.use()
                    write_replies(dense, setting.speculator, kind, ids, config.new_tokens, positions, setting.rounds)
                    advance(1)
