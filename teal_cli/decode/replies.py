"""A request on its way: its sampler, what it has said, and when it ends."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from teal_cli.decode.requests import Emitted, Request, Ticket, Usage
from teal_cli.decode.sampling import Sampler
from teal_cli.decode.slots import Row
from teal_cli.errors import ArtefactError


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
        self.done = 0
        """Tokens of the prompt that were run."""
        self.tokens: list[int] = []
        self.usage = Usage(len(request.prompt))
        self.has_prompt = False
        """Whether all of the prompt was run."""
        self._sampler: Sampler
        self._token: Tensor
        self._logits: Tensor
        self._logprobs: Tensor | None = None

    def begin(self, device: torch.device) -> None:
        """In the thread of the loop."""
        self._sampler = Sampler(self.request.sampling, device)

    def is_late(self, now: float) -> bool:
        """Whether its time is over."""
        limit = self.request.deadline_seconds
        return limit is not None and now - self._submitted > limit

    def row(self) -> Row:
        """What the next step takes."""
        return Row(self.slot, self.level, self._token)

    def choose(self, logits: Tensor) -> None:
        """The next token, on the device, from (1, vocabulary) logits, which the next step may overwrite."""
        self.has_prompt = True
        if self.request.mask is not None:
            logits = logits.clone()
            self.request.mask(logits[0], list(self.tokens))
        self._token = self._sampler.next_token(logits).view(1)
        self._most = logits.amax(-1)
        if self.request.logprobs is not None:
            self._logprobs = logits[0].float().log_softmax(-1)

    def take(self) -> Emitted:
        """Read the token that was chosen.

        Raises:
            ArtefactError: logits that are not numbers.
        """
        if not bool(self._most.isfinite()):
            raise ArtefactError("the model's logits are not numbers (NaN or infinite), or no token is allowed")
        token, request = int(self._token), self.request
        if token in request.stop:
            return Emitted(None, self.usage, "stop")
        self.tokens.append(token)
        self.usage = replace(self.usage, completion_tokens=len(self.tokens))
        finish = "length" if len(self.tokens) == request.max_new_tokens else None
        if self._logprobs is None:
            return Emitted(token, self.usage, finish)
        values, ids = self._logprobs.topk(request.logprobs or 0)
        top = dict(zip(ids.tolist(), values.tolist(), strict=True))
        return Emitted(token, self.usage, finish, None, float(self._logprobs[token]), top)

    def say(self, emitted: Emitted) -> bool:
        """Tell who asked; False where that fails."""
        try:
            self._on_emitted(emitted)
        except Exception:
            return False
        return True
