"""What users see: how far sparse and dense agree when they write, greedily, from the same prompts."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.decode.engine import Engine
from teal_cli.decode.sampling import SamplingConfig
from teal_cli.sparse import apply_plan_


@dataclass(frozen=True)
class Continuation:
    """What was written after one prompt; token ids."""

    prompt: list[int]
    dense: list[int]
    sparse: list[int]
    dense_choices: list[int]
    """What the dense model, fed with the sparse text, would have written in the place of each of its tokens."""


@dataclass(frozen=True)
class Agreement:
    """Greedy continuations of one plan beside the dense model's."""

    prompts: int
    prompt_tokens: int
    new_tokens: int
    """Written after each prompt, whatever they are: a text does not stop."""
    identical: float
    """Share of continuations that are the dense one, token for token."""
    tokens_until_difference: float
    """Mean number of tokens before the two texts part; new_tokens where they do not."""
    top1_agreement: float
    """Share of the dense model's own tokens that the sparse one would have chosen, given those before.
    The first is not counted: the prompt, which is dense, decides it."""
    dense_text_perplexity: float
    """Of the dense model's continuations, by the dense model."""
    sparse_text_perplexity: float
    """Of the sparse model's continuations, by the dense model: how likely it finds what the other writes."""
    realised_sparsity: float
    """While writing."""
    continuations: list[Continuation]
    """One a prompt."""


@torch.no_grad()
def agree(
    model: Any,
    plans: Sequence[SparsityPlan],
    prompts: Tensor,
    *,
    new_tokens: int,
    on_tokens: Callable[[int], None] = lambda tokens: None,
    dense: Any = None,
) -> list[Agreement]:
    """Let the dense and the sparse model continue prompts, and compare.

    Args:
        model: a causal language model with sparse layers; takes on the last plan.
        plans: what to compare.
        prompts: (prompts, tokens) int64.
        new_tokens: to write after each.
        on_tokens: called with the tokens written after each continuation.
        dense: another model to compare with: what `model` was before it was adapted.
    """
    engine = Engine(model)
    control = engine.control
    if control is None:
        raise ValueError("agreement is measured on a model with sparse layers")
    engine.check_length(prompts.shape[1], new_tokens)

    original, its_engine = (model, engine) if dense is None else (dense, Engine(dense))

    def write(prompt: Tensor, engine: Engine) -> list[int]:
        tokens = list(engine.generate(prompt[None], max_new_tokens=new_tokens, sampling=SamplingConfig()))
        on_tokens(len(tokens))
        return tokens

    with control.switched_off():
        dense_texts = [write(prompt, its_engine) for prompt in prompts]
        dense_losses = [loss for loss, _ in _judged(original, prompts, dense_texts)]
    results = []
    for plan in plans:
        apply_plan_(model, plan)
        with control.counting() as counter:
            sparse = [write(prompt, engine) for prompt in prompts]
        with control.switched_off():
            judged = _judged(original, prompts, sparse)
        results.append(
            Agreement(
                prompts=len(prompts),
                prompt_tokens=prompts.shape[1],
                new_tokens=new_tokens,
                identical=_mean([float(s == d) for s, d in zip(sparse, dense_texts, strict=True)]),
                tokens_until_difference=_mean([_common(s, d) for s, d in zip(sparse, dense_texts, strict=True)]),
                top1_agreement=_chosen_too(engine, prompts, dense_texts),
                dense_text_perplexity=math.exp(_mean(dense_losses)),
                sparse_text_perplexity=math.exp(_mean([loss for loss, _ in judged])),
                realised_sparsity=counter.model_wide() or 0.0,
                continuations=[
                    Continuation(prompt.tolist(), theirs, ours, choices)
                    for prompt, theirs, ours, (_, choices) in zip(prompts, dense_texts, sparse, judged, strict=True)
                ],
            )
        )
    return results


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _common(first: list[int], second: list[int]) -> int:
    """Tokens before the first difference."""
    return next((i for i, (a, b) in enumerate(zip(first, second, strict=True)) if a != b), len(first))


def _predictions(model: Any, prompt: Tensor, text: list[int]) -> Tensor:
    """(new tokens, vocabulary) logits of what predicts each token of a continuation."""
    ids = torch.cat([prompt, torch.tensor(text)])[None, :-1].to(model.device)
    logits: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=len(text)).logits[0]
    return logits.float()


def _judged(model: Any, prompts: Tensor, texts: list[list[int]]) -> list[tuple[float, list[int]]]:
    """Of each continuation, as the model runs now: the mean loss, and what the model puts first at each token."""
    judged = []
    for prompt, text in zip(prompts, texts, strict=True):
        logits = _predictions(model, prompt, text)
        loss = F.cross_entropy(logits, torch.tensor(text, device=model.device))
        judged.append((float(loss), logits.argmax(-1).tolist()))
    return judged


def _chosen_too(engine: Engine, prompts: Tensor, texts: list[list[int]]) -> float:
    """Share of given tokens, but the first of each text, that the sparse model puts first."""
    if engine.control is None:
        raise ValueError("needs a model with sparse layers")
    hits = count = 0
    with engine.control.masked(prompts.shape[1]):
        for prompt, text in zip(prompts, texts, strict=True):
            chosen = _predictions(engine.model, prompt, text).argmax(-1).tolist()
            hits += sum(a == b for a, b in zip(chosen[1:], text[1:], strict=True))
            count += len(text) - 1
    return hits / count
