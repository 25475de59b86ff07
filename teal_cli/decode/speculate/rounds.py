"""Drafts for the sequences of a scheduler, which come and go: a step verifies those of all of them.

At each place a reply chooses what it would choose without drafts: by its own mask and its own random numbers, from the
logits of the model. What was drafted is kept as long as it is what was chosen. So neither drafts nor who decodes beside
it change a text. Drafts are drawn by the random numbers that the choice is going to be made by, so that both agree as
often as they can.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from teal_cli.decode.levels import DENSE, Levels
from teal_cli.decode.picked import Picked
from teal_cli.decode.replies import Reply
from teal_cli.decode.slots import Drafting, Row, Slots
from teal_cli.decode.speculate.drafts import lookup_offer
from teal_cli.decode.speculate.lookup import NGrams
from teal_cli.decode.speculate.pace import Offer, Pace
from teal_cli.decode.speculate.speculator import Speculator
from teal_cli.speculation import MOST_DRAFTED

Choose = Callable[[Reply, Tensor, Tensor, int | None], int | None]
"""Chooses a reply's next token from (1, vocabulary) logits and (1,) int64 where they are largest, where a token was
drafted or none was, and says it; None where the reply has ended."""


@dataclass(frozen=True)
class Plan:
    """What the next step of some sequences is."""

    rows: int
    offer: Offer
    count: int
    """Tokens that are drafted for each; 0 for a plain step."""


class Rounds:
    """Drafts and verifies.

    Args:
        speculator: what drafts, and how many tokens.
        slots: of the sequences.
        device: of their tokens.
    """

    def __init__(self, speculator: Speculator, slots: Slots, device: torch.device) -> None:
        self._speculator, self._slots = speculator, slots
        self.drafted = 0
        """Tokens, so far."""
        self._paces: dict[int, Pace] = {}
        """By number of sequences."""
        self._texts: WeakKeyDictionary[Reply, NGrams] = WeakKeyDictionary()
        self._begun: Counter[tuple[int, str, int]] = Counter()
        self._unknown = 2 if device.type == "cuda" else 1
        """Passes of each kind that make sessions, kernels and graphs: what they take says nothing."""

    def plan(self, replies: Sequence[Reply]) -> Plan | None:
        """What pays for these replies now; None where some are not dense, and nothing is to be drafted or learnt."""
        if any(reply.level != DENSE for reply in replies):
            return None
        lengths = [self._slots.length(reply.slot) for reply in replies]
        room = min(self._slots.positions - 1 - max(lengths), max(reply.left for reply in replies) - 1)
        offers: list[Offer] = []
        if self._speculator.lookup:
            offers.append(lookup_offer([self._text_of(reply) for reply in replies]))
        if self._speculator.draft is not None:
            offers.append(Offer("model", "model", MOST_DRAFTED))
        alike = [replace(offer, kind=f"{offer.kind}, {_kind_of(replies)}") for offer in offers]
        return Plan(len(replies), *self._pace(len(replies)).choose(alike, room))

    def _pace(self, rows: int) -> Pace:
        if rows not in self._paces:
            counts = [span - 1 for span in self._slots.spans(rows) if 1 < span <= MOST_DRAFTED + 1]
            self._paces[rows] = Pace(counts, self._speculator.count)
        return self._paces[rows]

    def _text_of(self, reply: Reply) -> NGrams:
        """As far as it was read."""
        text, prompt = self._texts.setdefault(reply, NGrams()), reply.request.prompt
        if not len(text):
            text.extend(prompt)
        text.extend(reply.tokens[len(text) - len(prompt) :])
        return text

    def run(self, plan: Plan, replies: Sequence[Reply], choose: Choose) -> None:
        """Draft, verify and choose, for replies of which everything was read."""
        started = time.perf_counter()
        slots, before = self._slots, [self._slots.length(reply.slot) for reply in replies]
        taken = [0] * len(replies)
        judged = accepted = 0
        try:
            drafted = self._drafted(plan, replies, before)
            step = slots.step([reply.row(own or [0] * plan.count) for reply, own in zip(replies, drafted, strict=True)])
            for index, (reply, own, at) in enumerate(zip(replies, drafted, step.order, strict=True)):
                for place, expected in enumerate([*own, None]):
                    some = slice(place, place + 1)
                    token = choose(reply, step.logits[at, some], step.best[at, some], expected)
                    taken[index] += 1
                    judged += token is not None and expected is not None
                    if token is None or token != expected:
                        break
                    accepted += 1
        finally:  # what was refused, or what an error has left, is nobody's
            for reply, length, kept in zip(replies, before, taken, strict=True):
                slots.cut(reply.slot, length + kept)
        self.drafted += sum(map(len, drafted))
        self._record(plan, judged, accepted, time.perf_counter() - started)

    def ran_plain(self, plan: Plan, seconds: float | None) -> None:
        """Learn from a plain step; None where the time of it is not known."""
        self._record(plan, 0, 0, seconds)

    def _record(self, plan: Plan, judged: int, accepted: int, seconds: float | None) -> None:
        key = plan.rows, plan.offer.source, plan.count
        self._begun[key] += 1
        known = seconds if self._begun[key] > self._unknown else None
        self._pace(plan.rows).record(plan.offer, plan.count, judged, accepted, known)

    def _drafted(self, plan: Plan, replies: Sequence[Reply], lengths: Sequence[int]) -> list[list[int]]:
        """As many tokens for each reply; none for one whose text does not repeat itself."""
        if plan.offer.is_free:
            return [self._text_of(reply).following(plan.count)[0] for reply in replies]
        rows, samplers = [reply.row() for reply in replies], [reply.sampler_ahead() for reply in replies]
        tokens: list[Tensor] = []
        for _ in range(plan.count):
            step = self._slots.draft(rows)
            picked = step.picked or Picked(step.best[:, 0].clone())
            chosen = [
                picked.of_row(at) if sampler.greedy else sampler.next_token(step.logits[at]).view(1)
                for sampler, at in zip(samplers, step.order, strict=True)
            ]
            rows = [Row(row.slot, row.level, token) for row, token in zip(rows, chosen, strict=True)]
            tokens.append(torch.cat([row.tokens for row in rows]))
        for reply, length in zip(replies, lengths, strict=True):
            self._slots.cut(reply.slot, length)
        found: list[list[int]] = torch.stack(tokens, dim=1).tolist()
        return found


def drafting_of(speculator: Speculator, levels: Levels, level: float | None) -> Drafting:
    """What slots need of it.

    Args:
        speculator: of the engine, whose path may be another than when it was made.
        levels: that there are.
        level: at which sparse drafts skip inputs; None for the highest.

    Raises:
        UsageError: no such level, or a path that cannot take tokens back.
    """
    speculator.check()
    sparse = levels.check(max(levels.all) if level is None else level) if speculator.sparse else DENSE
    path = None if speculator.draft is None else speculator.draft_path
    return Drafting(path, sparse, speculator.count or MOST_DRAFTED)


def _kind_of(replies: Sequence[Reply]) -> str:
    """Whose drafts are accepted more often than those of the next kind."""
    if any(reply.request.mask is not None for reply in replies):
        return "masked"
    return "greedy" if all(reply.is_greedy for reply in replies) else "drawn"
