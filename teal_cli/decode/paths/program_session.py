"""What sessions share that execute block programs: how long they last, and what they count."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from teal_cli.decode.cache import FixedCache
from teal_cli.decode.paths.base import Session
from teal_cli.decode.sampling import Sampler
from teal_cli.errors import ArtefactError
from teal_cli.sparse import SparsityControl, SparsityCounter


@dataclass(frozen=True)
class Counted:
    """A projection whose dropped inputs a session counts."""

    name: str
    parameters: int
    seen: int
    """Inputs of one row in one step that it could drop; of a gate first's `up` outputs."""
    counter: int | None
    """Which of the session's numbers says how many were kept; None where nothing is dropped."""


class ProgramSession(Session):
    """Decoding of one batch of sequences.

    What is chosen at its start (thresholds, dense or sparse) stays: open a new one after the plan or the control
    changed.

    Args:
        control: of the model's sparse layers.
        cache: prefilled.
        rows: of the batch.
        sparse: whether inputs are skipped; by default as the control has it.
        span: tokens of each row that one step takes.
    """

    own_kernels = True
    counts_by_layer = False
    cache: FixedCache
    read: Tensor | None = None
    """(rows, 2) int64, written by `pick`: of each row its token, and 1 where its logits were numbers. None where that
    is not a part of a step."""

    def __init__(
        self,
        control: SparsityControl,
        cache: FixedCache,
        rows: int,
        device: torch.device,
        sparse: bool | None = None,
        span: int = 1,
    ) -> None:
        self.control, self.cache, self.rows, self.span = control, cache, rows * span, span
        self._made_for = control.decoding
        self.enabled = control.decodes_sparse if sparse is None else sparse
        self.token = torch.zeros(self.rows, dtype=torch.int64, device=device)
        self.lengths = cache.row_lengths()
        """Positions of each sequence that are taken."""
        self._count: _Count | None = None
        self._under_way = False

    def place(self, lengths: list[int]) -> None:
        """Say how long each row's sequence is, where others have taken the rows since the last step."""
        self.lengths = list(lengths)
        self.move(lengths)

    @abstractmethod
    def move(self, lengths: list[int]) -> None:
        """Have the next token of each row stand behind so many others."""

    @abstractmethod
    def use_levels(self, levels: list[int]) -> None:
        """Have each row skip inputs by the rules of a level, of a session that was opened with several."""

    @abstractmethod
    def pick(self) -> None:
        """Make the greedy choice from the last launch's logits the next launch's `token`."""

    def compile(self) -> None:
        """Compile the kernels of a step, several at a time, where a step would compile them one after the other."""
        return

    @abstractmethod
    def counted(self) -> Sequence[Counted]:
        """Every projection that is planned."""

    @abstractmethod
    def kept(self) -> Tensor:
        """(counters,) int64: inputs kept so far, summed over rows."""

    @property
    def read_whole(self) -> frozenset[str]:
        """As `Session.read_whole`."""
        return frozenset(own.name for own in self.counted() if own.counter is None) if self.enabled else frozenset()

    def choose(self, sampler: Sampler, logits: Tensor) -> None:
        """As `Session.choose`; the greedy choice is a part of the step."""
        if sampler.greedy:
            self.pick()
        else:
            super().choose(sampler, logits)

    @property
    def stale(self) -> bool:
        """As `Session.stale`; after a step that was interrupted too, since nobody knows how far it came."""
        changed = self._made_for != self.control.decoding or self.lengths != self.cache.row_lengths()
        return self._under_way or changed

    def begin(self) -> None:
        """Make sure of the positions, and let the counter of the moment count what is launched.

        Raises:
            ArtefactError: the cache is full.
        """
        if self.cache.length + self.span > self.cache.positions:
            raise ArtefactError(f"the KV cache is full: it was made for {self.cache.positions} positions")
        self._under_way = True
        counter = self.control.counter
        if self._count is not None and counter is not self._count.counter:
            self._count.stop()
            self._count = None
        if self.enabled and counter is not None and self._count is None:
            self._count = _Count(self, counter)
            counter.add_source(self._count.tally)

    def forget(self) -> None:
        """Let no counter hold on to this session, after a step that failed."""
        if self._count is not None:
            self._count.counter.remove_source(self._count.tally)
            self._count = None

    def end(self) -> None:
        """Every row has its tokens in the cache."""
        if self._count is not None:
            self._count.steps += 1
        self.cache.advance(self.span)
        self.lengths = self.cache.row_lengths()
        self._under_way = False


class _Count:
    """What one counter sees of a session: the steps since it came."""

    def __init__(self, session: ProgramSession, counter: SparsityCounter) -> None:
        self.counter = counter
        self.steps = 0
        self._session = session
        self._counted = session.counted()
        self._before = session.kept()
        self._after: Tensor | None = None

    def stop(self) -> None:
        """Steps from now on are not this counter's."""
        self._after = self._session.kept()

    def tally(self) -> dict[str, tuple[int, int, int]]:
        """Projection -> its parameters, inputs seen and inputs dropped."""
        after = self._session.kept() if self._after is None else self._after
        kept = (after - self._before).tolist()
        tallies = {}
        for projection in self._counted:
            seen = self.steps * self._session.rows * projection.seen
            dropped = 0 if projection.counter is None else seen - kept[projection.counter]
            tallies[projection.name] = (projection.parameters, seen, dropped)
        return tallies
