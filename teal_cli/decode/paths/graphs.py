"""A session whose rows change between steps; on a GPU its launches are captured once and replayed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from teal_cli.decode.paths.program_session import ProgramSession
from teal_cli.decode.picked import Picked, Token, tensor_of_all


class SteppedSession:
    """Steps of one session, whose rows and levels are said before each.

    On a GPU the first step runs as it is, the second is captured, and every further one is a
    replay.

    Args:
        session: whose launches can be captured, on a GPU.
    """

    def __init__(self, session: ProgramSession) -> None:
        self.session = session
        self.picked = Picked(session.token)
        """By the last step: (rows,) int64 where its logits are largest."""
        self._levels: list[int] = []
        self._logits: Tensor
        self._steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def compile(self) -> None:
        """As `ProgramSession.compile`."""
        self.session.compile()

    def place(self, lengths: list[int], levels: list[int]) -> None:
        """Say how long the sequences of the rows are, and which level each has."""
        if lengths != self.session.lengths or self._steps == 0:
            self.session.place(lengths)
        if levels != self._levels:
            self.session.use_levels(levels)
            self._levels = levels

    def step(self, tokens: Sequence[Token]) -> tuple[Tensor, Tensor]:
        """Of all rows (rows,) int64 -> (rows, vocabulary) logits, and (rows,) int64 where they are largest.

        The next step overwrites both, and what `read` has.
        """
        session = self.session
        if not self.picked.are_next(tokens):
            self._bring(tokens)
        session.begin()
        if not session.captures or self._steps == 0:
            self._body()
        else:
            if self._graph is None:
                self._graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):  # other threads may allocate
                    self._body()
            self._graph.replay()
        self._steps += 1
        session.end()
        self.picked = Picked(session.token)
        return self._logits, session.token

    def _bring(self, tokens: Sequence[Token]) -> None:
        """Put them where the step reads them."""
        given = tensor_of_all(tokens)
        self.picked.leave(tokens)
        self.session.token.copy_(given)

    @property
    def read(self) -> Tensor | None:
        """As `ProgramSession.read`: a part of the last step, and of its graph."""
        return self.session.read

    def forget(self) -> None:
        """As `ProgramSession.forget`."""
        self.session.forget()

    def _body(self) -> None:
        self._logits = self.session.launch()
        self.session.pick()
