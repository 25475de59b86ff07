"""A session of the native path: a step is a call of the library for every eight rows."""

from typing import Any, Protocol

import torch
from torch import Tensor

from teal_cli.decode.blocks import Attention, BlockStep, Norm, program_of
from teal_cli.decode.cache import FixedCache
from teal_cli.decode.paths.native_program import NativeProgram
from teal_cli.decode.paths.program_session import Counted, ProgramSession
from teal_cli.decode.positions import has_dynamic_rope, long_rope_from, rotary_at, rotary_tables
from teal_cli.errors import ArtefactError
from teal_cli.sparse import SparsityControl
from teal_kernels.native.library import Session, default_threads, shared_pool
from teal_kernels.native.structures import MAX_ROWS


class NativeModel(Protocol):
    """What a session needs of the native path (which imports this module)."""

    model: Any
    control: SparsityControl
    device: torch.device
    blocks: list[list[BlockStep]]
    last_norm: Norm


class NativeSession(ProgramSession):
    """Decoding of one batch of sequences, of any size: the library takes up to `MAX_ROWS` rows at a time.

    It holds the weights as they lie. Before a plan moves them it lets go of them (`SparsityControl.prepared`), so that
    they are not held twice; it is stale then. Of norms and biases it may hold copies: what is written to those in place
    makes it stale too, but for writes that torch does not count, through `.data` or to tensors of inference mode.

    Args:
        path: whose model decodes.
        cache: of the rows.
        program: of that model, as it is now.
        sparse: whether inputs are skipped, as in the program.
        span: tokens of each row that one step takes, at most `MAX_ROWS`; `token`, `positions`, `logits` and `best` have
            them one behind the other.

    Raises:
        ArtefactError: a shape that the library refuses.
    """

    captures = False

    def __init__(
        self,
        path: NativeModel,
        cache: FixedCache,
        program: NativeProgram,
        *,
        sparse: bool,
        span: int = 1,
    ) -> None:
        sequences = int(cache.layers[0].values.shape[0])
        super().__init__(path.control, cache, sequences, path.device, sparse, span)
        rows = self.rows
        self._program: NativeProgram | None = program
        self._counted = program.counted
        self.positions = torch.empty(rows, dtype=torch.int64)
        """(rows,) int64: where each of the next tokens stands."""
        self.move(self.lengths)
        self.levels = torch.zeros(rows, dtype=torch.int32)
        """(rows,) of sparsity."""
        self.logits = torch.empty(rows, path.model.get_output_embeddings().out_features)
        self.best = torch.empty(rows, dtype=torch.int64)
        self._angles = _Angles(path.model, path.blocks, cache.layers[0].values.shape[2], self.positions)
        rotary = self._angles.tables
        pool = shared_pool(default_threads())
        self._sessions = []
        at_once = MAX_ROWS // span
        of_rows = torch.arange(at_once, dtype=torch.int32).repeat_interleave(span)
        for start in range(0, sequences, at_once):
            stop = min(start + at_once, sequences)
            caches = [(layer.keys[start:stop], layer.values[start:stop]) for layer in cache.layers]
            some = slice(start * span, stop * span)
            try:
                session = Session(program.on(caches, rotary), pool, some.stop - some.start)
            except ValueError as error:
                raise ArtefactError(f"the native library cannot decode this model: {error}") from error
            buffers = self.token[some], self.positions[some], self.logits[some], self.best[some], self.levels[some]
            self._sessions.append((session, buffers, None if span == 1 else of_rows[: some.stop - some.start]))
        self._kept_at_the_end: Tensor | None = None
        self.computes_logits = True
        """Whether the next steps compute logits. In a prompt only the last ones are of use."""
        path.control.prepared.add(self)

    @property
    def stale(self) -> bool:
        """As `Session.stale`."""
        return super().stale or self._program is None or self._program.sources.is_overwritten

    @torch.no_grad()
    def launch(self) -> Tensor:
        """As `Session.launch`; float32 logits."""
        self._angles.for_positions(self.positions)
        for session, (token, positions, logits, best, levels), sequences_of_rows in self._sessions:
            session.step(token, positions, logits if self.computes_logits else None, best, levels, sequences_of_rows)
        return self.logits

    def move(self, lengths: list[int]) -> None:
        """As `ProgramSession.move`."""
        self.positions.copy_((torch.tensor(lengths)[:, None] + torch.arange(self.span)).flatten())

    def use_levels(self, levels: list[int]) -> None:
        """As `ProgramSession.use_levels`."""
        self.levels.copy_(torch.tensor(levels, dtype=torch.int32))

    def pick(self) -> None:
        """As `ProgramSession.pick`."""
        self.token.copy_(self.best)

    def end(self) -> None:
        """As `ProgramSession.end`."""
        self.positions += self.span
        super().end()

    def counted(self) -> list[Counted]:
        """As `ProgramSession.counted`."""
        return self._counted

    def kept(self) -> Tensor:
        """As `ProgramSession.kept`."""
        if self._kept_at_the_end is not None:
            return self._kept_at_the_end
        return torch.stack([session.kept() for session, *_ in self._sessions]).sum(0)

    def let_go(self) -> None:
        """Give back all that points to weights; nothing can be launched after it."""
        self._kept_at_the_end = self.kept()
        for session, *_ in self._sessions:
            session.close()
        self._sessions.clear()
        self._program = None


class _Angles:
    """The tables of a rotary embedding, which the library reads: of each kind (positions, rotated size) float32 twice.

    With long rope, a pass that reaches beyond the positions of the first training has other angles at all of its
    positions, as in transformers: the tables are written anew where it begins, or ends. With dynamic rope all
    depends on the passes so far: each step asks for those of its own positions.

    Args:
        model: with a block program.
        blocks: its steps.
        positions: of the cache.
        first: (rows,) int64, those of the first step.
    """

    def __init__(self, model: Any, blocks: list[list[BlockStep]], positions: int, first: Tensor) -> None:
        self._model, self._positions, self._from = model, positions, long_rope_from(model)
        self._dynamic, self._first = has_dynamic_rope(model), first
        self._is_long = False
        kinds = {step.angles for steps in blocks for step in steps if isinstance(step, Attention) and step.rotates}
        made = {kind: self._made(kind) for kind in kinds}
        self.tables = {kind: (tables[0], tables[1]) for kind, tables in made.items() if tables}

    def for_positions(self, positions: Tensor) -> None:
        """Make the tables those of a step at these positions, one a row."""
        if self._dynamic:
            for kind, tables in self.tables.items():
                for own, new in zip(
                    tables, self._paired(rotary_at(self._model, positions, torch.float32, kind)), strict=True
                ):
                    own[positions] = new
        if self._from is None or (int(positions.max()) >= self._from) == self._is_long:
            return
        self._is_long = not self._is_long
        for kind, tables in self.tables.items():
            for own, new in zip(tables, self._made(kind), strict=True):
                own.copy_(new)

    def _made(self, kind: str | float | None) -> tuple[Tensor, ...]:
        if not self._dynamic:
            return self._paired(rotary_tables(self._model, self._positions, torch.float32, self._last(), kind))
        like = self._paired(rotary_at(self._model, self._first, torch.float32, kind))
        return tuple(table.new_zeros(self._positions, table.shape[1]) for table in like)

    def _paired(self, tables: tuple[Tensor, Tensor] | None) -> tuple[Tensor, ...]:
        """As the library takes all; nothing of a model without a rotary embedding."""
        if tables is None or program_of(self._model).pairs != "neighbours_repeated":
            return tables or ()
        return tuple(torch.cat([table[:, ::2]] * 2, dim=1) for table in tables)

    def _last(self) -> int | None:
        if self._from is None:
            return None
        return max(self._from, self._positions - 1) if self._is_long else self._from - 1
