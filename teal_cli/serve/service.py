"""The model behind the server: loaded by a thread of its own, which then decodes until the server ends."""

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from teal_cli.config import ServeConfig
from teal_cli.decode.requests import Statistics
from teal_cli.decode.scheduler import Scheduler
from teal_cli.serve.errors import ApiError
from teal_cli.serve.grammars import Grammars
from teal_cli.serve.mailbox import Mailbox
from teal_cli.serve.metrics import Metrics
from teal_cli.serve.prompts import Prompts
from teal_cli.serve.tool_calls import ToolFormat


@dataclass(frozen=True)
class Served:
    """A model that is ready to answer."""

    name: str
    scheduler: Scheduler
    prompts: Prompts
    decoder: Any
    """A tokenizer that only the event loop's thread uses, to decode."""
    grammars: Grammars
    chat: bool
    """Whether it takes conversations."""
    tools: ToolFormat | None
    """How it writes calls of tools; None where its chat template does not know of any."""
    stop: frozenset[int]
    """Tokens that end a reply."""
    intrinsic: bool
    """Whether what it skips are its own zeros: it has no levels but dense and that."""
    speculates: str | None
    """What drafts, as `--speculate` has it; None where nothing does."""
    close: Callable[[], None]
    """Ends what was started beside the scheduler."""

    def describe(self) -> dict[str, Any]:
        """What /v1/models says of it beside OpenAI's fields."""
        levels = self.scheduler.levels
        return {
            "sparsity": list(levels.all),
            "default_sparsity": levels.default,
            "mode": "intrinsic" if self.intrinsic else "calibrated",
            "speculate": self.speculates,
            "chat": self.chat,
            "tools": self.tools is not None,
            "context": self.scheduler.positions,
            "slots": self.scheduler.slots.at_once,
        }


class Service:
    """One model, from before it is loaded until after it is stopped.

    Args:
        config: limits and defaults.
        load: makes the model ready; called by the thread that is going to decode.
        on_ready: called by that thread when the model is loaded.
        on_failure: called by that thread where loading or decoding failed for good: the server should end.
    """

    def __init__(
        self,
        config: ServeConfig,
        load: Callable[[], Served],
        *,
        on_ready: Callable[[Served], object] = lambda served: None,
        on_failure: Callable[[], object] = lambda: None,
    ) -> None:
        self.config = config
        self.created = int(time.time())
        self.metrics = Metrics(self._statistics)
        self.failure: BaseException | None = None
        """What ended the thread, where that was not `stop`."""
        self._load, self._on_ready, self._on_failure = load, on_ready, on_failure
        self._served: Served | None = None
        self._mailbox: Mailbox | None = None
        self._stopping = threading.Event()
        # A daemon: loading cannot be given up, and must not hold up an end of the process.
        self._thread = threading.Thread(target=self._work, name="teal-decode", daemon=True)

    def start(self) -> None:
        """Begin to load."""
        self._thread.start()

    def _work(self) -> None:
        try:
            served = self._load()
            if self._stopping.is_set():
                return
            self._served = served
            self._on_ready(served)
            served.scheduler.run()
        except BaseException as error:
            self.failure = error
            self._on_failure()

    @property
    def is_ready(self) -> bool:
        """Whether requests are answered now."""
        return self._served is not None and self.failure is None and not self._stopping.is_set()

    @property
    def served(self) -> Served:
        """The model.

        Raises:
            ApiError: it is not loaded yet, or no longer there.
        """
        if self._served is None or not self.is_ready:
            state = "the server ends" if self._stopping.is_set() or self.failure else "the model is being loaded"
            raise ApiError(503, f"{state}: try again later", code="not_ready")
        return self._served

    @property
    def mailbox(self) -> Mailbox:
        """By which the scheduler's thread reaches the event loop, in whose thread this is asked for."""
        if self._mailbox is None:
            self._mailbox = Mailbox(asyncio.get_running_loop())
            self.served.scheduler.on_said = self._mailbox.wake
        return self._mailbox

    def _statistics(self) -> Statistics | None:
        return None if self._served is None else self._served.scheduler.statistics()

    def cut(self) -> None:
        """End the replies under way: those who wait for them are told that the server ends."""
        if self._served is not None:
            self._served.scheduler.stop(drain=False)

    def stop(self, *, drain: bool, seconds: float) -> bool:
        """Take no more requests and wait for the thread; whether it ended in time.

        Args:
            drain: let replies under way end.
            seconds: to wait.
        """
        self._stopping.set()
        served = self._served
        if served is None:
            return False
        served.scheduler.stop(drain=drain)
        self._thread.join(seconds)
        served.close()
        return not self._thread.is_alive()
