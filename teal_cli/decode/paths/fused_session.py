"""A session of the fused path: the steps of all blocks bound to buffers, launched one right behind the other."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from teal_cli.decode.cache import FixedCache
from teal_cli.decode.paths.fused_launch import Launch
from teal_cli.decode.paths.fused_model import FusedModel
from teal_cli.decode.paths.fused_ranks import Step
from teal_cli.decode.paths.fused_steps import RowsLaunch, StepBinder
from teal_cli.decode.paths.program_session import Counted, ProgramSession
from teal_cli.decode.positions import learned_positions
from teal_cli.decode.row_levels import RowLevels
from teal_kernels.launching import compiling
from teal_kernels.operands import Positions, Scratch
from teal_kernels.triton_decode import LOGITS_BLOCK, Best, embed, find_best, output_logits, pick


class FusedSession(ProgramSession):
    """Decoding of one batch of sequences: the buffers between the launches.

    Tile configs of the products stay, as the plan for which they were chosen. With levels, each row skips inputs by the
    thresholds of its own. With a span, a step takes so many tokens of each sequence, one row behind the other.
    """

    read: Tensor

    def __init__(
        self,
        path: FusedModel,
        cache: FixedCache,
        rows: int,
        levels: RowLevels | None = None,
        *,
        sparse: bool | None = None,
        span: int = 1,
    ) -> None:
        super().__init__(path.control, cache, rows, path.device, sparse, span)
        rows = self.rows
        self.path = path
        self.captures = path.device.type == "cuda"
        device, dtype = path.device, path.dtype
        tuned_for = None if levels is None else levels.tuned_for
        self._kind = (self._made_for, self.enabled, self.rows, self.span, tuned_for)
        self.scratch = Scratch(device)  # of its own: a captured graph holds its addresses
        self.positions = Positions.at(self._before_tokens(self.lengths), device)
        self._angles = angles = path.angles(cache.positions)  # which others share while they hold it
        sums = path.sums(rows)
        binder = StepBinder(path, cache.layers, self.enabled, self.scratch, self.positions, angles, levels, span, sums)
        self._embedded, self._embedding_squares = binder.embedded, binder.squares
        binder.bind()
        self.launches = binder.launches
        binder.settle()
        self._normed: Tensor = binder.hidden
        """What the output layer reads, behind the norm that it takes up."""
        self._norm = None if path.last_norm.centred else binder.fused_norm(path.last_norm)
        if path.last_norm.centred:
            self._normed = binder.write_norm(path.last_norm, "normed")
        self._steps = binder.steps
        output = path.output()
        self.output = None if output is None else Launch(output, self.enabled, rows, dtype, levels=levels)
        own = path.model.get_output_embeddings().out_features
        self.logits = binder.buffer("logits", path.vocabulary)
        block_of_logits = LOGITS_BLOCK if self.output is not None or sums is not None else 0
        self.best = Best.empty(rows, path.vocabulary, device, block=block_of_logits)
        self.read = torch.zeros(rows, 2, dtype=torch.int64, device=device)
        self._own_logits, self._own_best = self.logits, self.best
        self._gather: list[Step] = []
        if sums is not None:
            self._own_logits, self._own_best = binder.buffer("own logits", own), Best.empty(rows, own, device)
            self._gather = sums.gather(self._own_logits, self.logits)
        of_positions, offset = learned_positions(path.model) or (None, 0)
        self._embed = partial(
            embed, of_positions=of_positions, offset=offset, scale=path.scales.embedding, pdl=path.pdl
        )

    @torch.no_grad()
    def compile(self) -> None:
        """As `ProgramSession.compile`; once for all sessions of a kind."""
        if not self.path.compiles or self._kind in self.path.compiled or torch.cuda.is_current_stream_capturing():
            return
        with compiling():
            self._launch()
            self.pick()
        self.path.compiled.add(self._kind)

    @torch.no_grad()
    def launch(self) -> Tensor:
        """As `Session.launch`; nothing waits."""
        self.compile()
        return self._launch()

    def _launch(self) -> Tensor:
        model, pdl, scales = self.path.model, self.path.pdl, self.path.scales
        self._embed(
            self.token, model.get_input_embeddings().weight, self.positions, self._embedded, self._embedding_squares
        )
        for step in self._steps:
            step()
        if self.output is not None:
            self.output.run(self._normed, self._own_logits, self.scratch, pdl, self._norm)
            self._gather_logits()
            find_best(self.logits, self.best, scale=scales.logits, cap=scales.logits_cap, pdl=pdl)
            return self.logits
        output = model.get_output_embeddings()
        output_logits(
            self._normed,
            self._norm,
            output.weight,
            output.bias,
            self._own_logits,
            self._own_best,
            scale=scales.logits,
            cap=scales.logits_cap,
            pdl=pdl,
        )
        if self._gather:
            self._gather_logits()
            find_best(self.logits, self.best, pdl=pdl)
        return self.logits

    def _before_tokens(self, lengths: list[int]) -> list[int]:
        """Of each row the position before that of its next token, to which a launch moves on."""
        return [length - 1 + index for length in lengths for index in range(self.span)]

    def end(self) -> None:
        """As `ProgramSession.end`."""
        if self.span > 1:  # a launch has moved rows on by one
            self.positions.own.add_(self.span - 1)
            self.positions.longest.add_(self.span - 1)
        super().end()

    def _gather_logits(self) -> None:
        """All ranks' logits on each: so all choose the same token, by the same launch."""
        for step in self._gather:
            step()

    def move(self, lengths: list[int]) -> None:
        """As `ProgramSession.move`."""
        last = torch.tensor(self._before_tokens(lengths), dtype=torch.int32)
        self.positions.own.copy_(last)
        if self.positions.longest is not self.positions.own:
            self.positions.longest.copy_(last.amax(0, keepdim=True))

    def use_levels(self, levels: list[int]) -> None:
        """As `ProgramSession.use_levels`."""
        of_rows = torch.tensor(levels, device=self.token.device)
        for launch in [*self.launches, *([self.output] if self.output else [])]:
            if isinstance(launch, Launch):
                launch.use_levels(of_rows)

    def pick(self) -> None:
        """As `ProgramSession.pick`; `read` is written by the same launch."""
        pick(self.best, self.token, self.read, pdl=self.path.pdl)

    def _planned(self) -> list[Launch | RowsLaunch]:
        output = self.output
        return [*self.launches, *([output] if output and output.product.sparse_layers[0].is_planned else [])]

    def counted(self) -> list[Counted]:
        """As `ProgramSession.counted`."""
        found, before = [], 0
        for launch in self._planned():
            for projection in launch.counted() if isinstance(launch, RowsLaunch) else _counted(launch):
                counter = None if projection.counter is None else before + projection.counter
                found.append(replace(projection, counter=counter))
            before += len(launch.kept)
        return found

    def kept(self) -> Tensor:
        """As `ProgramSession.kept`, on the device."""
        return torch.cat([launch.kept for launch in self._planned()])


def _counted(launch: Launch) -> list[Counted]:
    """The projections of a product; numbers of kept inputs are those in its `kept`."""
    return [
        Counted(
            layer.name,
            getattr(layer, "weights_read", layer.in_features * layer.out_features),
            layer.in_features * launch.times,
            None if launch.config.dense else part,
        )
        for part, layer in enumerate(launch.product.sparse_layers)
    ]
