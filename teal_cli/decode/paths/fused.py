"""The fused decode path: a token of a model with a block program in a few launches a block.

A block of the Llama family takes five:

    norm + q/k/v | rope + cache + attention | merge + o + residual | norm + gate/up + activation | down + residual

An MLP that decodes gate first takes as many (`teal_cli.decode.paths.fused_gate_first`), a routed one takes one more for
its router (`fused_routed`). The weights of each product lie
in one table (`teal_cli.sparse.merged`), those of gate first row by row. What a block computes is data
(`teal_cli.decode.blocks`). Nothing synchronises with the host, so a token is one CUDA graph.
"""

from itertools import chain
from typing import Any
from weakref import WeakValueDictionary

import torch

from teal_cli.decode.activations import unknown_activation
from teal_cli.decode.blocks import Attention, Product, block_steps, program_of
from teal_cli.decode.cache import FixedCache
from teal_cli.decode.departures import departure
from teal_cli.decode.paths.fused_angles import Angles
from teal_cli.decode.paths.fused_experts import cannot_route
from teal_cli.decode.paths.fused_heads import cannot_attend
from teal_cli.decode.paths.fused_launch import cannot_launch
from teal_cli.decode.paths.fused_ranks import Sums, SumTimes, measure_sums
from teal_cli.decode.paths.fused_session import FusedSession
from teal_cli.decode.paths.program import ProgramPath, is_spread, known_program, unsupported_rope, without_program
from teal_cli.decode.row_levels import RowLevels
from teal_cli.decode.scales import scales_of
from teal_cli.errors import ArtefactError, UsageError
from teal_cli.models.programs import Program
from teal_cli.models.shards import shards_of
from teal_cli.ranks.group import Ranks, ranks_of
from teal_cli.sparse import SparseLinear, SparsityControl
from teal_cli.sparse.experts import SparseExperts
from teal_kernels import backend_unavailable_reason
from teal_kernels.launching import hopper_or_later, interpreting
from teal_kernels.triton_gemv import MAX_ROWS
from teal_kernels.tuning_files import TuningTableError


def unsupported_on(model: Any, device: torch.device, dtype: torch.dtype, backend: str) -> str | None:
    """Why a model cannot take the fused path on a device, wherever it is now; None where it can."""
    config, program = model.config.get_text_config(), known_program(model)
    if program is None or not program.fused:
        return without_program(model)
    if device.type != "cuda" and not interpreting():
        return "no GPU"
    if backend not in ("auto", "triton"):
        return f"backend {backend}"
    if (reason := backend_unavailable_reason("triton", device, dtype)) is not None:
        return reason
    if (activation := unknown_activation(config, program)) is not None:
        return f"activation {activation}"
    if (key := _not_launched(program)) is not None:
        return f"blocks with {key}"
    return unsupported_rope(config, ("longrope", "proportional")) or departure(model, program)


def _not_launched(program: Program) -> str | None:
    """What of a program, or of its steps, there is no kernel for; None where there are all."""
    products = program.products
    if any(step.added_norm for step in products) and any(step.parallel or step.aside for step in products):
        return "added_norm in parallel blocks"
    if any(step.stream_scale and not step.added_norm for step in products):
        return "stream_scale without added_norm"
    return None


def _is_in_the_plan(product: Product) -> bool:
    """Whether all layers of a product are sparse ones, side by side as the program has them."""
    if product.experts:
        return isinstance(product.layers[0], SparseExperts)
    if product.gate_first is not None or product.routed is not None:
        return True
    sparse = all(isinstance(layer, SparseLinear) for layer in product.layers)
    return sparse and product.sparse_layers[0].merged.are_all(product.layers)


class FusedPath(ProgramPath):
    """Launches the tokens of one model."""

    name = "fused"
    reported = "compact"
    devices = ("cuda",)  # the interpreter runs it on a CPU too, where it is asked for by name

    def __init__(self, model: Any, control: SparsityControl | None) -> None:
        super().__init__(model, control)
        self.dtype: torch.dtype = model.dtype
        self.scales = scales_of(model, program_of(model))
        self.pdl = hopper_or_later(self.device)
        # Steps of ranks also call collectives, which would really run.
        self.compiles = self.device.type == "cuda" and not interpreting() and ranks_of(model) is None
        self.compiled: set[tuple[object, ...]] = set()
        self._sums: dict[int, Sums] = {}
        self._angles: WeakValueDictionary[int, Angles] = WeakValueDictionary()

    @classmethod
    def unsupported(cls, model: Any, control: SparsityControl | None) -> str | None:
        """As `Path.unsupported`; sparse layers must lie as the kernels read them."""
        parameter = next(model.parameters())
        backend = "auto" if control is None else control.backend
        reason = unsupported_on(model, parameter.device, parameter.dtype, backend)
        if reason is not None:
            return reason
        if is_spread(model):
            return "weights on several devices"
        layers = [layer for layer in model.modules() if isinstance(layer, SparseLinear)]
        if not all(layer.merged.one_table or layer.is_output or isinstance(layer, SparseExperts) for layer in layers):
            return "projections that are not side by side"
        blocks = block_steps(model)
        products = [step for block in blocks for step in block if isinstance(step, Product)]
        if control is not None and not all(map(_is_in_the_plan, products)):
            return "projections that the plan leaves out"
        attentions = [step for block in blocks for step in block if isinstance(step, Attention)]
        reasons = chain(map(cannot_attend, attentions), map(cannot_launch, products), map(cannot_route, blocks))
        return next((reason for reason in reasons if reason is not None), None)

    def angles(self, positions: int) -> Angles:
        """As `FusedModel.angles`."""
        found = self._angles.get(positions)
        if found is None:
            self._angles[positions] = found = Angles.of(self.model, self.blocks, positions, self.dtype)
        return found

    def output(self) -> Product | None:
        """Of an output layer that drops inputs by now, or is quantised; another one is read row by row, as it lies."""
        output = self.model.get_output_embeddings()
        if not isinstance(output, SparseLinear):
            return None
        output.merged.lay_out_()  # plans that were only set, and not applied, have left that to whom decodes
        return Product("output", (output,), "plain") if output.merged.one_table else None

    @property
    def vocabulary(self) -> int:
        """Logits of the model, of all ranks."""
        plan = shards_of(self.model)
        return int(self.model.get_output_embeddings().out_features) if plan is None else plan.vocabulary

    def sums(self, rows: int) -> Sums | None:
        """Over ranks, for a session of so many rows; None where one process holds the model."""
        ranks = ranks_of(self.model)
        if ranks is None:
            return None
        if rows not in self._sums:
            self._sums[rows] = self._sum_times(ranks).open(ranks, rows)
        summed = sum(isinstance(step, Product) and self.is_summed(step) for block in self.blocks for step in block)
        self._sums[rows].begin(summed, self._stream, self.model.get_output_embeddings().out_features)
        return self._sums[rows]

    def is_summed(self, product: Product) -> bool:
        """As `FusedModel.is_summed`."""
        plan = shards_of(self.model)
        if plan is None or product.epilogue != "residual":
            return False
        return plan.sums_inputs_of(product.sparse_layers[0].name)

    @property
    def _stream(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[1])

    def _sum_times(self, ranks: Ranks) -> SumTimes:
        return measure_sums(ranks, self._stream, self.dtype, self.pdl)

    @property
    def notes(self) -> list[str]:
        """As `Path.notes`."""
        ranks = ranks_of(self.model)
        return [] if ranks is None else [self._sum_times(ranks).line]

    def new_cache(self, length: int) -> FixedCache:
        """An empty cache."""
        return FixedCache(self.attentions, length, copies=self.copies)

    def open(self, cache: FixedCache) -> FusedSession:
        """As `Path.open`: at most `MAX_ROWS` rows, and the tuning table may be damaged."""
        rows = cache.layers[0].keys.shape[0]
        if rows > MAX_ROWS:
            raise UsageError(f"a batch of {rows} is more than the GPU kernels decode together ({MAX_ROWS})")
        try:
            return FusedSession(self, cache, rows)
        except TuningTableError as error:
            raise ArtefactError(str(error)) from error

    def spans_for(self, sequences: int) -> tuple[int, ...]:
        """As `ProgramPath.spans_for`: as many rows as a launch takes."""
        return tuple(range(1, MAX_ROWS // sequences + 1))

    def open_rows(
        self,
        cache: FixedCache,
        levels: RowLevels | None,
        *,
        sparse: bool,
        span: int = 1,
    ) -> FusedSession:
        """As `ProgramPath.open_rows`; as `open`."""
        rows = cache.layers[0].keys.shape[0]
        try:
            return FusedSession(self, cache, rows, levels if sparse else None, sparse=sparse, span=span)
        except TuningTableError as error:
            raise ArtefactError(str(error)) from error
