"""Replies under way: from the scheduler's tokens to pieces of text, in the thread of the event loop."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from teal_cli.decode.requests import Emitted, Request, Ticket, Usage
from teal_cli.decode.scheduler import Scheduler
from teal_cli.decode.streaming import TextStream
from teal_cli.serve.errors import ApiError
from teal_cli.serve.service import Service
from teal_cli.serve.stop_strings import StopStrings


@dataclass(frozen=True)
class ChosenToken:
    """A token with its probability, and those of the likeliest ones."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass
class Piece:
    """What came of one reply: text, and the tokens that it may be of."""

    text: str = ""
    tokens: list[ChosenToken] = field(default_factory=list)
    """Where logarithms of probabilities were asked for."""
    finish: str | None = None
    """`stop` or `length`, with the last piece."""


@dataclass
class Timing:
    """When tokens of a reply came, in seconds of `time.perf_counter`."""

    submitted: float
    first: float | None = None
    last: float | None = None
    tokens: int = 0

    @property
    def tokens_per_second(self) -> float | None:
        """Of the decode steps; None for a reply of one token."""
        if self.first is None or self.last is None or self.tokens < 2 or self.last <= self.first:
            return None
        return (self.tokens - 1) / (self.last - self.first)


class Reply:
    """One reply: its tokens, as text up to a stop string.

    Args:
        tokenizer: decodes; only the event loop's thread uses it.
        stops: strings that end the reply.
        skip_special_tokens: whether the text is without them.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], *, skip_special_tokens: bool = True) -> None:
        self._written: list[str] = []
        self._stream = TextStream(tokenizer, self._written.append, skip_special_tokens=skip_special_tokens)
        self._stops = StopStrings(stops)
        self.ticket: Ticket | None = None
        self.usage = Usage()
        self.timing = Timing(time.perf_counter())
        self.accepted = 0
        """Of the tokens up to a stop string, those that were drafted."""
        self.is_done = False

    def take(self, came: Sequence[tuple[Emitted, float]]) -> Piece:
        """Turn what the scheduler said into a piece, which may be empty.

        Args:
            came: with the time of each.

        Raises:
            ApiError: decoding failed, or the server ends.
        """
        piece = Piece()
        for emitted, at in came:
            self.usage = emitted.usage
            if emitted.token is not None and not self.is_stopped:
                self._take_token(emitted, at, piece)
            if emitted.finish is not None:
                if not self.is_stopped:
                    self._stream.end()
                    piece.text += self._through() + self._stops.end()
                # A stop string ended it, or has become whole by what still waited.
                piece.finish = "stop" if self.is_stopped else _finish(emitted)
                self.is_done = True
        return piece

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string has come: the scheduler does not know of it, and has to be told."""
        return self._stops.found is not None

    def _take_token(self, emitted: Emitted, at: float, piece: Piece) -> None:
        if emitted.token is None:
            return
        timing = self.timing
        timing.first = at if timing.first is None else timing.first
        timing.last, timing.tokens = at, timing.tokens + 1
        self.accepted = emitted.usage.accepted_tokens
        self._stream.put([emitted.token])
        piece.text += self._through()
        if emitted.logprob is not None:
            piece.tokens.append(ChosenToken(emitted.token, emitted.logprob, tuple(emitted.top_logprobs.items())))

    def _through(self) -> str:
        text = "".join(self._written)
        self._written.clear()
        return self._stops.put(text) if text else ""


def _finish(emitted: Emitted) -> str:
    if emitted.finish == "error":
        raise ApiError(500, f"decoding failed: {emitted.error}", code="decoding")
    if emitted.finish == "cancelled":
        raise ApiError(503, "the server ends", code="stopping")
    return "stop" if emitted.finish == "stop" else "length"  # its time was over: cut, as by its length


_Came = tuple[int, Emitted, float]
"""The number of a reply, what was said of it, and when."""


class Replies:
    """The replies to one HTTP request, whose pieces come as they come.

    Args:
        scheduler: decodes.
        requests: one for each reply; those to one prompt side by side.
        replies: of them, in the same order.
        each: how many there are to each prompt.
        service: whose metrics are told of times and tokens, and whose mailbox brings what the scheduler says.

    Raises:
        QueueFullError, UsageError: as `Scheduler.submit`; then those that were submitted before are cancelled.
    """

    def __init__(
        self, scheduler: Scheduler, requests: Sequence[Request], replies: Sequence[Reply], each: int, service: Service
    ) -> None:
        self._scheduler, self._each, self._metrics, self._mailbox = scheduler, each, service.metrics, service.mailbox
        self._came: list[_Came] = []
        self._has_come = asyncio.Event()
        self.all = list(replies)
        try:
            for index, request in enumerate(requests):
                self.all[index].usage = Usage(len(request.prompt))
                self.all[index].ticket = scheduler.submit(request, self._listener(index))
        except BaseException:
            self.close()
            raise

    def _listener(self, index: int) -> Callable[[Emitted], None]:
        def on_emitted(emitted: Emitted) -> None:  # in the scheduler's thread
            self._mailbox.put(self._take, (index, emitted, time.perf_counter()))

        return on_emitted

    def _take(self, came: _Came) -> None:
        self._came.append(came)
        self._has_come.set()

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """The number of a reply and what came of it, until all have ended.

        Raises:
            ApiError: decoding failed, or the server ends.
        """
        while not all(reply.is_done for reply in self.all):
            await self._has_come.wait()
            self._has_come.clear()
            came: dict[int, list[tuple[Emitted, float]]] = {}
            waiting, self._came = self._came, []
            for index, emitted, at in waiting:
                came.setdefault(index, []).append((emitted, at))
            for index, emitted_ones in came.items():
                reply = self.all[index]
                had_first = reply.timing.first is not None
                piece = reply.take(emitted_ones)
                if not had_first and reply.timing.first is not None:
                    self._metrics.first_token(reply.timing.first - reply.timing.submitted)
                if reply.is_done:
                    self._metrics.reply(reply.timing.tokens_per_second)
                elif reply.is_stopped and reply.ticket is not None:
                    self._scheduler.cancel(reply.ticket, "stop")  # which says the end
                yield index, piece

    def close(self) -> None:
        """Give up those that have not ended."""
        for reply in self.all:
            if reply.ticket is not None and not reply.is_done:
                self._scheduler.cancel(reply.ticket)

    @property
    def usage(self) -> dict[str, Any]:
        """As OpenAI's API has it, of all replies; a prompt that several share counts once."""
        first = [reply.usage for reply in self.all[:: self._each]]
        prompt, cached = sum(one.prompt_tokens for one in first), sum(one.cached_tokens for one in first)
        completion = sum(reply.timing.tokens for reply in self.all)
        speeds = [speed for reply in self.all if (speed := reply.timing.tokens_per_second) is not None]
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
            "teal": {
                "accepted_tokens": sum(reply.accepted for reply in self.all),
                "realised_sparsity": self.all[0].usage.realised_sparsity,
                "tokens_per_second": min(speeds, default=None),
            },
        }
