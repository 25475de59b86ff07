"""Step after step: each token is chosen on the device and is the next step's input."""

import warnings
from typing import Any

import torch
from torch import Tensor

from teal_cli.decode.paths.base import Decoder
from teal_cli.decode.sampling import Sampler
from teal_cli.ranks.group import ranks_of


class TokenLoop:
    """Decodes the sequences of one cache, one token of each at a time.

    On a GPU the first step runs as it is (what is not compiled yet is, libraries wake up), the second is
    captured as a CUDA graph with its sampling, and every further one is a replay. A forward that
    cannot be captured goes on without a graph.

    Args:
        engine: whose model decodes.
        cache: prefilled.
        token: (rows, 1) int64, the first token after each prompt.
        sampler: chooses the tokens.
    """

    def __init__(self, engine: Decoder, cache: Any, token: Tensor, sampler: Sampler) -> None:
        self._engine, self._cache, self._sampler = engine, cache, sampler
        self._session = engine.open(cache)
        self._session.token.copy_(token.view(-1))
        self.logits: Tensor
        """(rows, vocabulary), of the last step; a replay overwrites them."""
        self._steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self.captures = self._session.captures
        """Whether steps are, or are going to be, replays of a graph."""

    @staticmethod
    def first_steps(engine: Decoder) -> int:
        """Steps at the start of a loop that compile and capture, which a timing leaves out."""
        return 2 if engine.device.type == "cuda" else 0

    @torch.no_grad()
    def advance(self) -> Tensor:
        """Decode one token of every row: (rows, 1) int64 on the device, overwritten by the next step."""
        if self._session.stale:
            self._renew()
        session = self._session
        session.begin()
        counter = self._engine.control.counter if self._engine.control else None
        counting = session.counts_by_layer and counter is not None and counter.active
        if not self.captures or self._steps == 0 or counting:
            self._body()
        else:
            if self._graph is None:
                self._capture()
            if self._graph is not None:
                self._graph.replay()
            else:
                self._body()
        self._steps += 1
        session.end()
        return session.token.view(-1, 1)

    @property
    def read_whole(self) -> frozenset[str]:
        """As `Session.read_whole`."""
        return self._session.read_whole

    def take(self, token: Tensor) -> None:
        """Let the next step read another token than was chosen: (rows, 1) int64."""
        self._session.token.copy_(token.view(-1))

    def _renew(self) -> None:
        """Drop what was prepared or captured for another plan."""
        token, self._graph = self._session.token.clone(), None
        self._session = self._engine.open(self._cache)
        self._session.token.copy_(token)

    def _body(self) -> None:
        self.logits = self._session.launch()
        self._session.choose(self._sampler, self.logits)

    def _capture(self) -> None:
        graph = self._empty_graph()
        try:
            # With ranks a thread of NCCL asks for events meanwhile.
            mode = "global" if ranks_of(self._engine.model) is None else "thread_local"
            capture = torch.cuda.graph(graph, capture_error_mode=mode)
            with capture:
                self._body()
        except RuntimeError as error:
            # Our own launches can be captured: an error there is ours. Memory that is missing, too.
            if self._session.own_kernels or isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            self.captures = False
            torch.cuda.synchronize(self._engine.device)
            # Seen once (H200, torch 2.11): after a capture that failed no random number could be drawn in the process
            # ("Offset increment outside graph capture"). A capture that succeeds takes the generators out of it.
            with warnings.catch_warnings(), torch.cuda.graph(self._empty_graph()):
                warnings.simplefilter("ignore")  # it captures nothing
            return
        # On the capture's stream torch sets the place in the random numbers to 0, and on this one, before each replay,
        # to where it is. On a busy GPU the 0 came last: a reply drew by its first numbers again (H200, torch 2.11).
        assert capture.capture_stream is not None  # noqa: S101  (torch's own, where none is given)
        torch.cuda.current_stream(self._engine.device).wait_stream(capture.capture_stream)
        self._graph = graph

    def _empty_graph(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        if self._sampler.generator is not None:
            graph.register_generator_state(self._sampler.generator)
        return graph
