"""What is asked of a scheduler, and what it says as tokens come."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from teal_cli.decode.sampling import SamplingConfig
from teal_cli.errors import MachineError, TealError, UsageError

Mask = Callable[[Tensor, list[int]], None]
"""Changes a row's logits in place before a token is chosen: (vocabulary,) logits, and the reply's tokens so far."""

Finish = Literal["stop", "length", "time", "cancelled", "error"]
"""Why a reply ended: a stop token; as many tokens as were asked for; its time was over; somebody cancelled it (or the
scheduler was stopped); an error, which is said."""


class QueueFullError(MachineError):
    """As many requests wait as may wait: try again later."""


@dataclass(frozen=True)
class Request:
    """A prompt, and how its reply is decoded."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """With its own seed: the numbers that are drawn depend on nothing else."""
    stop: frozenset[int] = frozenset()
    """Tokens that end the reply. They are not part of it."""
    sparsity: float | None = None
    """One of the scheduler's levels; 0 is dense, None its default."""
    logprobs: int | None = None
    """With how many alternatives the logarithm of each token's probability is said; None says none, 0 the token's."""
    deadline_seconds: float | None = None
    """After which the reply ends, from its submission on; None for never."""
    mask: Mask | None = None
    """Rules tokens out before each choice (a grammar), by writing -inf. The thread of the loop calls it."""

    def check(self, vocabulary: int, positions: int) -> None:
        """Refuse what a model of this vocabulary cannot decode in a slot of so many positions.

        Raises:
            UsageError: see above.
        """
        prompt, new = self.prompt, self.max_new_tokens
        if not prompt or new < 1:
            raise UsageError("a request needs a prompt of at least one token, and at least one new token")
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            raise UsageError(f"the prompt has a token outside of the vocabulary of {vocabulary}")
        if len(prompt) + new > positions:
            raise UsageError(f"{len(prompt)} prompt tokens and {new} new ones exceed the {positions} of a slot")
        if self.logprobs is not None and not 0 <= self.logprobs <= vocabulary:
            raise UsageError(f"logprobs of {self.logprobs} tokens: at least 0")


@dataclass(frozen=True)
class Usage:
    """What a reply has cost so far."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt, those whose keys and values a slot had: they were not run again."""
    completion_tokens: int = 0
    accepted_tokens: int = 0
    """Of them, those that were drafted and accepted."""
    realised_sparsity: float | None = None
    """Said at the end: of the steps that wrote the reply, those of other replies in them included. None where none of
    them ran sparse."""


@dataclass(frozen=True)
class Emitted:
    """A token of a reply, or its end, or both: the last token of a reply that is as long as was asked for is its end.

    Exactly one of a request's has a `finish`, the last one.
    """

    token: int | None
    usage: Usage
    finish: Finish | None = None
    error: str | None = None
    """What went wrong, in one line, where `finish` is "error"."""
    logprob: float | None = None
    """Of the token, after the mask and before temperature, top-k and top-p; None where `Request.logprobs` is."""
    top_logprobs: Mapping[int, float] = field(default_factory=dict)
    """Token -> logarithm of its probability, the most probable ones in order."""


@dataclass(frozen=True)
class Ticket:
    """A request that was taken."""

    number: int


@dataclass(frozen=True)
class Statistics:
    """What a scheduler does now, and has done since it was made."""

    running: int
    """Requests in slots, those whose prompts are still being run among them."""
    queued: int
    slots: int
    finished: Mapping[str, int]
    """How many requests ended each way."""
    prompt_tokens: int
    """Of all prompts that were begun."""
    cached_tokens: int
    """Of them, those that a slot had already."""
    completion_tokens: int
    passes: int
    """Steps that wrote replies, each counted once for each sequence: fewer than tokens where drafts were accepted."""
    drafted_tokens: int | None
    """That a pass has verified; None where nothing drafts."""
    accepted_tokens: int | None
    """Of them, those that became a reply's."""
    realised_sparsity: float | None
    """Of the steps so far, weights not read over the weights of the blocks' projections; None where
    none ran sparse."""
    cache_positions: int
    """Of all slots."""
    cache_used: int
    """Positions that running requests take."""
    cache_kept: int
    """Positions of ended ones that are kept for those that begin alike."""


def said(error: BaseException) -> str:
    """What went wrong, in one line."""
    if isinstance(error, TealError):
        return str(error)
    lines = str(error).strip().splitlines()
    return ": ".join([type(error).__name__, *lines[:1]])
