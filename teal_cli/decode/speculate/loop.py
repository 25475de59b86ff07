"""Rounds of speculation: draft, verify in one pass, keep what the model agrees with."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from teal_cli.decode.paths.base import Stepper
from teal_cli.decode.sampling import Sampler
from teal_cli.decode.speculate.accept import accept_greedy, accept_sampled
from teal_cli.decode.speculate.drafts import Draft, Drafted
from teal_cli.decode.speculate.pace import Pace
from teal_cli.threads import in_one_thread

_AHEAD = 4
"""Passes without drafts that a GPU may run before the host reads their tokens."""


@dataclass
class Tally:
    """What speculation did so far."""

    passes: int = 0
    """Of the model that verifies, of each sequence."""
    tokens: int = 0
    drafted: int = 0
    judged: int = 0
    """Of the drafted tokens, those up to and with the first of each pass that was not accepted."""
    accepted: int = 0
    counts: Counter[int] = field(default_factory=Counter)
    """Passes by the number of tokens that were drafted for them."""
    close: int = 0
    """Tokens whose two best logits lie within rounding of a 16-bit dtype, so that a pass over several tokens may choose
    the other. None is counted where a pass gives the bits of single steps."""

    @property
    def acceptance(self) -> float | None:
        """Share of the judged tokens that were accepted."""
        return self.accepted / self.judged if self.judged else None

    @property
    def tokens_per_pass(self) -> float | None:
        """Tokens that a pass of the model gave."""
        return self.tokens / self.passes if self.passes else None


class SpeculativeLoop:
    """Decodes the sequences of one cache, some tokens of each at a time.

    The cache holds keys and values of the model that verifies: its pass overwrites those of drafts.

    Args:
        target: runs the model that verifies, on the prefilled cache.
        drafts: the sources of tokens.
        pace: chooses among them.
        positions: that the cache has.
        lengths: that are taken, of each sequence.
        token: (rows,) int64, the first token behind each prompt.
        sampler: chooses the tokens.
        tally: that is added to.
    """

    def __init__(
        self,
        target: Stepper,
        drafts: Sequence[Draft],
        pace: Pace,
        *,
        positions: int,
        lengths: Sequence[int],
        token: Tensor,
        sampler: Sampler,
        tally: Tally | None = None,
    ) -> None:
        self._target, self._drafts, self._pace, self._sampler = target, drafts, pace, sampler
        self._positions = positions
        self.lengths, self.token = list(lengths), token.view(-1).clone()
        self.tally = Tally() if tally is None else tally
        self._ended: set[int] = set()
        self._begun: Counter[tuple[str, int]] = Counter()
        self._on_gpu = token.is_cuda

    def end(self, row: int) -> None:
        """A sequence goes on no more; the others do."""
        self._ended.add(row)

    @torch.no_grad()
    def advance(self) -> list[list[int]]:
        """One round: the tokens by which each sequence went on, at least one of those that have not ended."""
        started = time.perf_counter()
        room = self._positions - max(self.lengths) - 1
        offers = [draft.offer() for draft in self._drafts]
        offer, count = self._pace.choose(offers, room)
        if count == 0 and self._on_gpu and (certain := min(self._pace.certain(offers), _AHEAD, room + 1)) > 1:
            return self._plain(certain)
        drafted: Drafted | None = None
        tokens = self.token[:, None]
        if count:
            drafted = self._drafts[offers.index(offer)].draft(self.token, self.lengths, count)
            tokens = torch.cat([tokens, drafted.tokens], dim=1)
        logits, best = self._target.run(tokens, self.lengths)
        accepted, behind = self._accept(drafted, logits, best)
        chosen = torch.cat([accepted[:, None], behind[:, None], tokens[:, 1:]], dim=1).tolist()  # the host waits once
        seconds = time.perf_counter() - started
        self.token = behind
        new = [[*own[2 : 2 + own[0]], own[1]] for own in chosen]
        judged, agreed = self._note(count, [own[0] for own in chosen], logits)
        self._begun[offer.source, count] += 1
        is_first = self._begun[offer.source, count] <= (2 if self._on_gpu else 1)  # sessions, kernels, graphs are made
        self._pace.record(offer, count, judged, agreed, None if is_first else seconds)
        return self._went_on(new)

    def _plain(self, count: int) -> list[list[int]]:
        """So many passes without drafts, for which the host waits once."""
        started = time.perf_counter()
        chosen = []
        for index in range(count):
            logits, best = self._target.run(self.token[:, None], [length + index for length in self.lengths])
            none, self.token = self._accept(None, logits, best)
            chosen.append(self.token)
            self._note(0, [0] * len(none), logits)
        new: list[list[int]] = torch.stack(chosen, dim=1).tolist()
        self._pace.record_plain(count, (time.perf_counter() - started) / count)
        return self._went_on(new)

    @in_one_thread
    def _accept(self, drafted: Drafted | None, logits: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
        none = best[:, :0]
        if self._sampler.greedy:
            return accept_greedy(best, none if drafted is None else drafted.tokens)
        wanted = self._sampler.probabilities(logits.flatten(0, 1)).view(*logits.shape)
        if drafted is None:
            return torch.zeros_like(best[:, 0]), self._sampler.draw(wanted[:, 0])[:, 0]
        return accept_sampled(wanted, drafted.tokens, drafted.probabilities, self._sampler.generator)

    def _went_on(self, new: list[list[int]]) -> list[list[int]]:
        for row, tokens in enumerate(new):
            if row in self._ended:
                new[row] = []
                continue
            self.lengths[row] += len(tokens)
            for draft in self._drafts:
                draft.see(row, tokens)
        return new

    def _note(self, count: int, accepted: list[int], logits: Tensor) -> tuple[int, int]:
        """Add a pass to the tally; its judged and accepted tokens, of the sequences that have not ended."""
        running = [number for row, number in enumerate(accepted) if row not in self._ended]
        self.tally.passes += len(running)
        self.tally.tokens += sum(running) + len(running)
        self.tally.drafted += count * len(running)
        agreed, judged = sum(running), sum(min(number + 1, count) for number in running)
        self.tally.accepted += agreed
        self.tally.judged += judged
        self.tally.counts[count] += 1
        if not self._target.exact and logits.dtype in (torch.bfloat16, torch.float16) and self._sampler.greedy:
            top = logits.float().topk(2).values
            near = (top[..., 0] - top[..., 1]) <= torch.finfo(logits.dtype).eps * top[..., 0].abs()
            for row, number in enumerate(accepted):
                self.tally.close += int(near[row, : number + 1].sum()) if row not in self._ended else 0
        return judged, agreed
