"""A request on its way: its sampler, what it has said, and when it ends."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from teal_cli.decode.picked import Picked, Token, tensor_of
from teal_cli.decode.reading import Reading
from teal_cli.decode.requests import Emitted, Finish, Request, Ticket, Usage
from teal_cli.decode.sampling import Sampler
from teal_cli.decode.slots import Chosen, Row
from teal_cli.errors import ArtefactError
from teal_cli.sparse.counting import Counts
from teal_cli.threads import in_one_thread

_PIECES = 128
"""At most, of a row of logits."""


class Reply:
    """One request in the loop.

    Args:
        ticket: its number.
        request: what was asked.
        level: of sparsity.
        on_emitted: told of tokens and the end.
        submitted: when, in seconds of `time.monotonic`.
    """

    def __init__(
        self,
        ticket: Ticket,
        request: Request,
        level: float,
        on_emitted: Callable[[Emitted], None],
        submitted: float,
    ) -> None:
        self.ticket, self.request, self.level = ticket, request, level
        self._on_emitted, self._submitted = on_emitted, submitted
        self.slot = -1
        """-1 before it has one."""
        self.ended = False
        self.done = 0
        """Tokens of the prompt that were run."""
        self.chosen = 0
        """Tokens that were chosen; the last ones may not be read yet."""
        self.tokens: list[int] = []
        """Those that were read."""
        self.usage = Usage(len(request.prompt))
        self.counts_before: Counts | None = None
        """What was dropped before its first step."""
        self._sampler: Sampler
        self._token: Token

    def begin(self, device: torch.device) -> None:
        """In the thread of the loop."""
        self._sampler = Sampler(self.request.sampling, device)

    @property
    def steps(self) -> bool:
        """Whether a step is to be taken: its prompt was run, and not all of its tokens are chosen."""
        return 0 < self.chosen < self.request.max_new_tokens

    @property
    def needs_all_read(self) -> bool:
        """Whether its next choice depends on what the host has read."""
        return self.request.mask is not None

    def is_late(self, now: float) -> bool:
        """Whether its time is over."""
        limit = self.request.deadline_seconds
        return limit is not None and now - self._submitted > limit

    def row(self, drafted: Sequence[int] = ()) -> Row:
        """What the next step takes: the last token, and those that were drafted behind it."""
        if not drafted:
            return Row(self.slot, self.level, self._token)
        token = tensor_of(self._token)
        behind = torch.tensor(drafted, dtype=torch.int64, device=token.device)
        return Row(self.slot, self.level, torch.cat([token, behind]))

    def sampler_ahead(self) -> Sampler:
        """As `Sampler.ahead`: what drafts draw by agrees with what is going to be drawn as often as it can."""
        return self._sampler.ahead()

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self._sampler.greedy

    @property
    def left(self) -> int:
        """Tokens that may still be chosen."""
        return self.request.max_new_tokens - self.chosen

    @in_one_thread
    def choose(self, logits: Tensor, best: Tensor | None = None, drafted: int | None = None) -> "Choice":
        """The next token, on the device, from (1, vocabulary) logits, which the next step may overwrite.

        Args:
            logits: after the last token.
            best: (1,) int64, where they are largest, if that is known.
            drafted: the token that was drafted for this place.
        """
        if self.request.mask is not None:
            logits, best = logits.clone(), None
            self.request.mask(logits[0], list(self.tokens))
        greedy = self._sampler.greedy and best is not None
        token = best.clone() if greedy and best is not None else self._sampler.next_token(logits).view(1)
        self._token = token
        self.chosen += 1
        finite = _are_numbers(logits)
        if self.request.logprobs is None:
            return Choice(self, Reading(torch.stack([token, finite], dim=1)), drafted=drafted)
        logprobs = logits[0].float().log_softmax(-1)
        values, ids = logprobs.topk(self.request.logprobs)
        own = logprobs.gather(0, token)
        numbers = torch.cat([token, finite, ids]).view(1, -1)
        return Choice(self, Reading(numbers), logprobs=Reading(torch.cat([own, values])), drafted=drafted)

    def choose_at(self, likeliest: "Likeliest", at: int) -> "Choice":
        """The next token after a step, in which this reply has row `at`."""
        request, step = self.request, likeliest.step
        if request.mask is not None or request.logprobs is not None or not self._sampler.greedy:
            return self.choose(step.logits[at], step.best[at])
        picked, numbers = likeliest.read
        self._token = picked.of_row(at)
        self.chosen += 1
        return Choice(self, numbers, at)

    def take(self, numbers: list[int], logprobs: list[float] | None, drafted: int | None) -> Emitted:
        """A token that was read.

        Args:
            numbers: the token, whether the logits were numbers, and the most probable tokens.
            logprobs: the token's own, and theirs.
            drafted: the token that was drafted for its place.

        Raises:
            ArtefactError: logits that are not numbers.
        """
        token, finite, *likely = numbers
        if not finite:
            raise ArtefactError("the model's logits are not numbers (NaN or infinite), or the mask allows no token")
        if token in self.request.stop:
            return Emitted(None, self.usage, "stop")
        self.tokens.append(token)
        accepted = self.usage.accepted_tokens + (token == drafted)
        self.usage = replace(self.usage, completion_tokens=len(self.tokens), accepted_tokens=accepted)
        finish: Finish | None = "length" if len(self.tokens) == self.request.max_new_tokens else None
        if logprobs is None:
            return Emitted(token, self.usage, finish)
        own, *others = logprobs
        return Emitted(token, self.usage, finish, None, own, dict(zip(likely, others, strict=True)))

    def say(self, emitted: Emitted) -> bool:
        """Tell who asked; False where that fails."""
        try:
            self._on_emitted(emitted)
        except Exception:
            return False
        return True


class Likeliest:
    """The likeliest tokens after a step of one token a row. Rows that take them are read together.

    Row by row, each would cost a GPU eight launches and a copy to the host between two steps. A step of the fused path
    leaves what is read: then the copy alone stands between two replays of its graph.

    Args:
        step: the next one may overwrite it, once `read` was asked for.
    """

    def __init__(self, step: Chosen) -> None:
        self.step = step

    @cached_property
    @in_one_thread
    def read(self) -> tuple[Picked, Reading]:
        """The tokens; on their way to the host (rows, 2) int64: them, and 1 where the logits were numbers."""
        best, read = self.step.best[:, 0], self.step.read
        if read is None:
            read = torch.stack([best, _are_numbers(self.step.logits[:, 0])], dim=1)
        return self.step.picked or Picked(best.clone()), Reading(read)


class Choice:
    """A token on its way to the host.

    Args:
        reply: whose it is.
        numbers: rows of int64: the token, 1 where the logits were numbers, and the most probable tokens.
        row: of them.
        logprobs: the token's own, and theirs.
        drafted: the token that was drafted for its place.
    """

    def __init__(
        self,
        reply: Reply,
        numbers: Reading,
        row: int = 0,
        *,
        logprobs: Reading | None = None,
        drafted: int | None = None,
    ) -> None:
        self.reply, self.drafted = reply, drafted
        self._numbers, self._row, self._logprobs = numbers, row, logprobs

    def take(self) -> Emitted:
        """Wait for it. As `Reply.take`."""
        logprobs = None if self._logprobs is None else self._logprobs.tensor().tolist()
        return self.reply.take(self._numbers.rows()[self._row], logprobs, self.drafted)


def _are_numbers(logits: Tensor) -> Tensor:
    """(rows, vocabulary) -> (rows,) int64: 1 where something can be chosen: the largest is a number, and none is NaN.

    In two steps, as few launches as it takes: a GPU reduces a long row in a few of its parts alone (27 microseconds of
    128,256 logits on an H200).
    """
    vocabulary = logits.shape[-1]
    pieces = math.gcd(vocabulary, _PIECES)
    top = logits.reshape(-1, pieces, vocabulary // pieces).amax(-1).amax(-1)
    return (top - top == 0).to(torch.int64)  # of NaN and infinities it is NaN
