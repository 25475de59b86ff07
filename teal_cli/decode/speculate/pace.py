"""How many tokens are drafted: as many as give the most tokens a second, by what was accepted and what it took.

A pass that verifies `count` drafted tokens gives 1 + a + .. + a^count tokens, where a is the share of judged tokens
that agree. What it takes is measured. Where nothing pays, nothing is drafted, and it is tried again ever more seldom.
"""

import statistics
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_JUDGED = 64
"""Judged tokens after which older ones count a third."""
_AGREED_BEFORE = 0.75
"""The share that is assumed before any was judged, and counts as two tokens do."""
_TIMES = 9
"""Passes whose median is the time of their kind."""
_GAIN = 1.02
"""More tokens a second than without drafts: less is noise."""
_FIRST_WAIT, _LONGEST_WAIT = 16, 512
"""Passes without drafts before one is tried again, at first and at most."""
_PLAIN_EVERY = 48
"""Passes of which one drafts nothing, so that its time is known."""
_DRAFT_SHARE = 0.4
"""Of a plain pass, what a token of a draft takes before it was measured."""


@dataclass(frozen=True)
class Offer:
    """What a draft could do now."""

    source: str
    """Whose time is measured."""
    kind: str
    """Whose agreement is counted: of lookups one for each number of tokens that were the same."""
    most: int
    """Tokens."""
    rows: float = 1.0
    """Share of the sequences that it has tokens for."""
    is_free: bool = False
    """Whether drafting itself takes no time."""


NOTHING = Offer("", "", 0)


class Pace:
    """Chooses drafts and their lengths, of one model on one machine.

    Args:
        counts: numbers of tokens that may be drafted, from 1 on up.
        fixed: the only number that is drafted; None chooses.
        timed: whether what passes took counts; else times stay as they are assumed before they were measured, and the
            choice follows from what was accepted alone.
    """

    def __init__(self, counts: Sequence[int], fixed: int | None = None, *, timed: bool = True) -> None:
        self._counts, self._fixed, self._timed = tuple(counts), fixed, timed
        self._agreed: defaultdict[str, float] = defaultdict(lambda: 2 * _AGREED_BEFORE)
        self._judged: defaultdict[str, float] = defaultdict(lambda: 2.0)
        self._seconds: defaultdict[tuple[str, int], deque[float]] = defaultdict(lambda: deque(maxlen=_TIMES))
        self._waits: dict[str, int] = {}
        self._rests: dict[str, int] = {}
        self._since_plain = 0

    def agreement(self, kind: str) -> float:
        """Share of the judged tokens that were accepted, of late."""
        return self._agreed[kind] / self._judged[kind]

    def choose(self, offers: Sequence[Offer], room: int) -> tuple[Offer, int]:
        """What drafts, and how many tokens; `NOTHING` and 0 for a plain pass.

        Args:
            offers: in the order in which they are taken where the number is fixed.
            room: tokens that may be drafted at most.
        """
        able = [offer for offer in offers if offer.most > 0 and room > 0]
        if self._fixed is not None:
            most = max(self._counts, default=0)
            return (able[0], min(self._fixed, able[0].most, room, most)) if able and most else (NOTHING, 0)
        if not able or not self._knows_plain or (self._timed and self._since_plain >= _PLAIN_EVERY):
            return NOTHING, 0
        best = max(
            (
                (self._gain(offer, count), index, count)
                for index, offer in enumerate(able)
                for count in self._counts
                if count <= min(offer.most, room)
            ),
            default=(0.0, 0, 0),
        )
        gain, index, count = best
        offer = able[index]
        if gain >= _GAIN:
            self._waits.pop(offer.kind, None)
            return offer, count
        return self._after_a_rest(offer, count)

    def certain(self, offers: Sequence[Offer]) -> int:
        """Passes that draft nothing for certain, from one for which nothing was chosen on."""
        if self._fixed is not None or any(offer.is_free for offer in offers) or not self._knows_plain:
            return 1
        return min((self._rests.get(offer.kind, 1) for offer in offers if offer.most), default=1)

    def record_plain(self, count: int, seconds: float) -> None:
        """Learn from so many passes that drafted nothing, of which `choose` has seen the first.

        Args:
            count: at most as many as were certain.
            seconds: of each.
        """
        self._rests = {kind: rest - (count - 1) for kind, rest in self._rests.items()}
        self.record(NOTHING, 0, 0, 0, seconds)

    def _after_a_rest(self, offer: Offer, count: int) -> tuple[Offer, int]:
        """Nothing, most of the time: what does not pay may pay later, as the text goes on."""
        kind = offer.kind
        if kind not in self._waits:
            self._waits[kind] = self._rests[kind] = _FIRST_WAIT
        self._rests[kind] -= 1
        if self._rests[kind] > 0 or count == 0:
            return NOTHING, 0
        self._waits[kind] = self._rests[kind] = min(2 * self._waits[kind], _LONGEST_WAIT)
        return offer, min(count, self._counts[0])

    def _gain(self, offer: Offer, count: int) -> float:
        """Tokens a second over those of plain passes."""
        share = self.agreement(offer.kind)
        tokens = sum(share**index for index in range(count + 1))
        return (1 + offer.rows * (tokens - 1)) * self._plain / self._time(offer, count)

    @property
    def _knows_plain(self) -> bool:
        return not self._timed or len(self._seconds["", 0]) >= 2

    @property
    def _plain(self) -> float:
        return statistics.median(self._seconds["", 0]) if self._timed else 1.0

    def _time(self, offer: Offer, count: int) -> float:
        """Of a pass with its drafts: measured, or by what was measured with the nearest number of tokens."""
        known = [size for size in self._counts if self._seconds.get((offer.source, size))]
        if not known:
            return self._plain * (1 + count * (0.02 if offer.is_free else _DRAFT_SHARE + 0.02))
        nearest = min(known, key=lambda size: abs(size - count))
        seconds = statistics.median(self._seconds[offer.source, nearest])
        return max(seconds + (count - nearest) * (seconds - self._plain) / nearest, self._plain)

    def record(self, offer: Offer, count: int, judged: int, accepted: int, seconds: float | None) -> None:
        """Learn from a pass.

        Args:
            offer: what drafted; `NOTHING`.
            count: tokens it drafted for each sequence.
            judged: of them, those up to and with the first that was not accepted, of all sequences.
            accepted: of them.
            seconds: that drafting and verifying took; None where it says nothing (kernels were compiled).
        """
        self._since_plain = self._since_plain + 1 if count else 0
        if seconds is not None and self._timed:
            self._seconds[offer.source if count else "", count].append(seconds)
        if judged:
            keep = (1 - 1 / _JUDGED) ** judged
            self._agreed[offer.kind] = self._agreed[offer.kind] * keep + accepted
            self._judged[offer.kind] = self._judged[offer.kind] * keep + judged

    def seconds(self) -> Mapping[tuple[str, int], float]:
        """Median of a pass, by source and number of drafted tokens."""
        return {key: statistics.median(times) for key, times in self._seconds.items() if times}
