"""Several sequences in one loop: each is admitted, stepped and ended by itself, whatever the others do.

One thread runs the loop and is the only one that uses the model. Any thread may submit and cancel.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from itertools import count
from threading import Condition

import torch
from torch import Tensor

from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.decode.engine import Engine
from teal_cli.decode.led_slots import follow, led
from teal_cli.decode.levels import DENSE, Levels
from teal_cli.decode.prompts import Keep
from teal_cli.decode.replies import Choice, Likeliest, Reply
from teal_cli.decode.requests import Emitted, Finish, QueueFullError, Request, Statistics, Ticket, Usage, said
from teal_cli.decode.shared_slots import slots_of
from teal_cli.decode.speculate.rounds import Rounds, drafting_of
from teal_cli.decode.speculate.speculator import Speculator
from teal_cli.errors import TealError, UsageError
from teal_cli.ranks.group import RanksApartError
from teal_cli.sparse import SparsityCounter

_COUNT_EVERY = 8
"""Steps of which one is counted, where layers count by themselves: all took 15 % of the speed (`steps.generate`)."""
_READ_EVERY = 64
"""Steps after which counts are read, for which the device may have to finish."""


class Scheduler:
    """Decodes requests, as many together as there are slots.

    Args:
        engine: whose model decodes. From here on nobody else may use it while the loop runs.
        slots: sequences that decode together, at most.
        positions: of each slot: a prompt and its reply; None for the model's own, at most 4096.
        queue: requests that wait, at most, beside those in slots.
        levels: sparsity -> its plan, of those that requests may ask for beside 0; None for the model's own.
        default: the level of requests that name none; None for the highest, or 0 where the engine measured that sparse
            steps are slower.
        keep: what slots keep of sequences that have ended for those that begin alike.
        together: whether rows are stepped together, where the path can. One by one each gives, bit for bit, what it
            gives alone. Together a text may change: on a GPU products that do not pay for many rows are read whole: a
            sparse request skips less (`Usage.realised_sparsity`); on a CPU sums are added up in another order.
        speculator: of this engine: drafts tokens of dense requests where that pays. Requests that name no level are
            then dense, unless `default` says another.
        draft_level: at which sparse drafts skip inputs; None for the highest.

    Raises:
        UsageError: numbers of no use, or a model that cannot take back what was drafted.
        ArtefactError: a plan that is not the model's.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        slots: int = 8,
        positions: int | None = None,
        queue: int = 64,
        levels: Mapping[float, SparsityPlan] | None = None,
        default: float | None = None,
        keep: Keep = "prompts",
        together: bool = True,
        speculator: Speculator | None = None,
        draft_level: float | None = None,
    ) -> None:
        if slots < 1 or queue < 0:
            raise UsageError(f"{slots} slots and a queue of {queue} are of no use")
        self.engine = engine
        self.positions = min(engine.max_length, positions or 4096)
        probe = torch.arange(min(12, self.positions)).view(1, -1)
        engine.check(probe)  # which may put another path in the place of one that is wrong
        self.choice = engine.choose(probe) if default is None and speculator is None and engine.chooses else None
        if default is None and (speculator is not None or (self.choice and self.choice.decodes == "dense")):
            default = DENSE
        self.levels = Levels(engine.model, engine.control, levels, default)
        self._counter = SparsityCounter()
        drafting = None if speculator is None else drafting_of(speculator, self.levels, draft_level)
        own = slots_of(engine, slots, self.positions, self.levels, keep, together=together, drafting=drafting)
        self.slots, self._messages = led(own, engine.model, self._counter)
        self._rounds = None if speculator is None else Rounds(speculator, self.slots, engine.device)
        self._most_queued = queue
        self._vocabulary = int(engine.model.get_input_embeddings().weight.shape[0])
        self._numbers = count(1)
        # What other threads touch, under the lock.
        self._changed = Condition()
        self._queue: deque[Reply] = deque()
        self._cancelled: dict[int, Finish] = {}
        self._waiting_or_running: set[int] = set()
        self._stopping: bool | None = None  # whether to drain, once it stops
        self.on_said: Callable[[], object] = lambda: None
        """Called by the loop's thread after `on_emitted`, once for all that a step gave. It must not wait or raise."""
        # What the loop alone touches.
        self._running: list[Reply] = []
        self._under_way: deque[list[Choice]] = deque()
        self._ahead = 1 if engine.device.type == "cuda" else 0  # steps that the device runs ahead of the host
        self._realised: float | None = None
        self._steps = 0
        self._finished: Counter[str] = Counter()
        self._tokens = Counter[str]()
        self._has_drafted = False

    def submit(self, request: Request, on_emitted: Callable[[Emitted], None]) -> Ticket:
        """Take a request. Any thread may.

        Args:
            request: what to decode.
            on_emitted: called with each token and the end, by the thread of the loop: it must not wait. What it raises
                ends the request.

        Raises:
            UsageError: a request that cannot be decoded here, whenever.
            QueueFullError: too many wait.
        """
        level = self._check(request)
        with self._changed:
            if self._stopping is not None:
                raise QueueFullError("no more requests are taken: the scheduler stops")
            if len(self._queue) >= self._most_queued + max(0, self.slots.at_once - len(self._running)):
                raise QueueFullError(f"{len(self._queue)} requests wait already")
            ticket = Ticket(next(self._numbers))
            self._queue.append(Reply(ticket, request, level, on_emitted, time.monotonic()))
            self._waiting_or_running.add(ticket.number)
            self._changed.notify()
        return ticket

    def _check(self, request: Request) -> float:
        request.check(self._vocabulary, self.positions)
        try:
            self.engine.check_length(len(request.prompt), request.max_new_tokens)
        except TealError as error:
            raise UsageError(str(error)) from error
        return self.levels.check(request.sparsity)

    def cancel(self, ticket: Ticket, finish: Finish = "cancelled") -> None:
        """End a request before its next token; nothing of one that has ended. Any thread may.

        Args:
            ticket: of the request.
            finish: how it ended: `stop` where its text is whole, which the scheduler cannot know.
        """
        with self._changed:
            if ticket.number in self._waiting_or_running:
                self._cancelled.setdefault(ticket.number, finish)
                self._changed.notify()

    def run(self) -> None:
        """The loop, until `stop`. One thread runs it, once. What it raises ends every request."""
        try:
            self._loop()
        except BaseException as error:
            self._end_all(error)
            raise

    def follow(self) -> None:
        """In place of `run`, on ranks that are not the first: do what that one does, until it stops.

        Raises:
            TypeError: one process decodes.
            MachineError: another rank has ended or hangs.
        """
        with self._counting(), torch.no_grad():
            follow(self.slots, self._messages, self._counter)

    def _loop(self) -> None:
        while self._wait():
            with self._counting(), torch.no_grad():
                self._turn()
        self.slots.close()

    def _counting(self) -> AbstractContextManager[object]:
        return nullcontext() if self.engine.control is None else self.engine.control.counting(self._counter)

    def _end_all(self, error: BaseException) -> None:
        """Tell everybody that nothing more comes."""
        with self._changed:
            self._stopping = False
            left = [*self._running, *self._queue]
            self._queue.clear()
        for reply in left:
            with suppress(Exception):  # the others are to be told whatever happens with one
                self._end(reply, "error", said(error))
        self.on_said()

    def stop(self, drain: bool = True) -> None:
        """Take no more requests, and let `run` return: once all are done, or at once, cancelling them."""
        with self._changed:
            self._stopping = drain and self._stopping is not False
            self._changed.notify()

    def statistics(self) -> Statistics:
        """What happens now. Any thread may ask.

        Numbers of the step under way may be of before or after it; the realised sparsity is some steps old.
        """
        with self._changed:
            queued = len(self._queue)
        used, kept = self.slots.use()
        return Statistics(
            running=len(self._running),
            queued=queued,
            slots=self.slots.count,
            finished=dict(self._finished),
            **{f"{kind}_tokens": self._tokens[kind] for kind in ("prompt", "cached", "completion")},
            passes=self._tokens["passes"],
            drafted_tokens=None if self._rounds is None else self._rounds.drafted,
            accepted_tokens=None if self._rounds is None else self._tokens["accepted"],
            realised_sparsity=self._realised,
            cache_positions=self.slots.count * self.positions,
            cache_used=used,
            cache_kept=kept,
        )

    def _wait(self) -> bool:
        """Until there is something to do; False once all is done."""
        if not self._running:
            self._under_way.clear()  # of replies that have ended
            self._realised = self._counter.model_wide()
        while self._is_idle():
            self.slots.keep_others_waiting()
        with self._changed:
            if self._stopping is False:
                for number in self._waiting_or_running:
                    self._cancelled.setdefault(number, "cancelled")
            return bool(self._queue or self._running)

    def _is_idle(self) -> bool:
        """Whether nothing comes for as long as the slots may be silent."""
        with self._changed:
            return not self._changed.wait_for(self._has_work, self.slots.longest_silence)

    def _has_work(self) -> bool:
        return bool(self._queue or self._running) or self._stopping is not None

    def _turn(self) -> None:
        """Endings, admissions, a piece of a prompt, and a step of all that have their prompt."""
        self._end_those_to_be_ended()
        self._admit()
        new = next((reply for reply in self._running if reply.chosen == 0), None)
        if new is not None:
            with self._blaming(new):
                self._run_prompt(new)
        self._read()
        stepping = [reply for reply in self._running if reply.steps]
        if stepping:
            with self._blaming(*stepping):
                self._advance(stepping)
        self._read()

    def _read(self, everything: bool = False) -> None:
        """Take what has come, so that the device runs ahead of the host by so many steps and no more."""
        stepping = [reply for reply in self._running if reply.steps]
        needs_all = everything or not stepping or any(reply.needs_all_read for reply in stepping)
        ahead = 0 if needs_all else self._ahead
        while len(self._under_way) > ahead:
            self._take(self._under_way.popleft())
        self.on_said()

    def _end_those_to_be_ended(self) -> None:
        now = time.monotonic()
        with self._changed:
            cancelled, self._cancelled = self._cancelled, {}
            finishes = ((one, cancelled.get(one.ticket.number)) for one in [*self._running, *self._queue])
            over = [(one, finish or "time") for one, finish in finishes if finish or one.is_late(now)]
            ended = {reply.ticket.number for reply, _ in over}
            self._queue = deque(reply for reply in self._queue if reply.ticket.number not in ended)
        for reply, finish in over:
            self._end(reply, finish)

    def _admit(self) -> None:
        while len(self._running) < self.slots.at_once:
            with self._changed:
                if not self._queue:
                    return
                self._running.append(reply := self._queue.popleft())  # whoever is in neither is told of no end
            with self._blaming(reply):
                self._begin(reply)

    def _begin(self, reply: Reply) -> None:
        taken = {one.slot for one in self._running}
        free = [slot for slot in range(self.slots.count) if slot not in taken]
        reply.slot = self.slots.choose_slot(free, reply.request.prompt)
        reply.begin(self.engine.device)
        reply.done = cached = self.slots.begin(reply.slot, reply.request.prompt)
        reply.usage = replace(reply.usage, prompt_tokens=len(reply.request.prompt), cached_tokens=cached)
        self._tokens["prompt"] += len(reply.request.prompt)
        self._tokens["cached"] += cached

    def _run_prompt(self, reply: Reply) -> None:
        reply.done, logits = self.slots.run_prompt(reply.slot, reply.request.prompt, reply.done)
        if logits is not None:
            self._under_way.append([reply.choose(logits)])

    def _advance(self, replies: list[Reply]) -> None:
        """A plain step of all, or what was drafted for them. While a prompt is run, which waits, steps are plain."""
        rounds, plan = self._rounds, None
        if rounds is not None and all(reply.chosen for reply in self._running):
            plan = rounds.plan(replies)
        if rounds is None or plan is None:
            self._step(replies)
        elif plan.count:
            self._read(everything=True)
            if not any(reply.ended for reply in replies):  # else the next turn has another plan
                rounds.run(plan, replies, self._choose_and_say)
                self._tokens["passes"] += len(replies)
                self._has_drafted = True
        else:
            started, under_way = time.perf_counter(), len(self._under_way)
            self._step(replies)
            self._read(everything=self._has_drafted)  # the time of a single plain step would not be known
            is_known, self._has_drafted = len(self._under_way) == under_way, False
            rounds.ran_plain(plan, time.perf_counter() - started if is_known else None)

    def _choose_and_say(self, reply: Reply, logits: Tensor, best: Tensor, drafted: int | None) -> int | None:
        """As `rounds.Choose`."""
        with self._blaming(reply):
            self._take([reply.choose(logits, best, drafted)])
        return None if reply.ended else reply.tokens[-1]

    def _step(self, replies: list[Reply]) -> None:
        for reply in replies:
            if reply.counts_before is None and self.engine.control is not None:
                reply.counts_before = self._counter.counts()
        self._counter.active = self._steps % _COUNT_EVERY == 0
        self._steps += 1
        if self._steps % _READ_EVERY == 0:
            self._realised = self._counter.model_wide()
        step = self.slots.step([reply.row() for reply in replies])
        choices, likeliest = [], Likeliest(step)
        for reply, at in zip(replies, step.order, strict=True):
            with self._blaming(reply):
                choices.append(reply.choose_at(likeliest, at))
        self._under_way.append(choices)
        self._tokens["passes"] += len(replies)

    def _take(self, choices: list[Choice]) -> None:
        """Read what was chosen, and say it."""
        for choice in choices:
            reply = choice.reply
            if reply.ended:
                continue
            with self._blaming(reply):
                emitted = choice.take()
                if emitted.token is not None:
                    self._tokens["completion"] += 1
                    self._tokens["accepted"] += emitted.token == choice.drafted
                    self.slots.add(reply.slot, emitted.token)
                if (finish := emitted.finish) is not None:
                    emitted = replace(emitted, usage=self._with_sparsity(reply))
                    self._forget(reply, finish)
                if not reply.say(emitted) and finish is None:
                    self._end(reply, "cancelled")

    @contextmanager
    def _blaming(self, *replies: Reply) -> Iterator[None]:
        """Whatever is raised inside ends these replies, not the loop."""
        try:
            yield
        except RanksApartError:  # this ends everybody's
            raise
        except Exception as error:
            for reply in replies:
                if not reply.ended:
                    self._end(reply, "error", said(error))

    def _with_sparsity(self, reply: Reply) -> Usage:
        """Its usage, with the sparsity of its steps. In the loop's thread alone: on a GPU this waits for the device."""
        if reply.counts_before is None:
            return reply.usage
        counts = self._counter.counts()
        self._realised = counts.model_wide()
        return replace(reply.usage, realised_sparsity=counts.since(reply.counts_before).model_wide())

    def _end(self, reply: Reply, finish: Finish, error: str | None = None) -> None:
        usage = reply.usage
        if finish != "error":
            with suppress(Exception):  # a device that failed: whoever waits is told the end all the same
                usage = self._with_sparsity(reply)
        self._forget(reply, finish)
        reply.say(Emitted(None, usage, finish, error))

    def _forget(self, reply: Reply, finish: Finish) -> None:
        """Its slot is free."""
        reply.ended = True
        if reply in self._running:
            self._running.remove(reply)
            if reply.slot >= 0:
                self.slots.end(reply.slot)
        self._finished[finish] += 1
        with self._changed:
            self._waiting_or_running.discard(reply.ticket.number)
            self._cancelled.pop(reply.ticket.number, None)
