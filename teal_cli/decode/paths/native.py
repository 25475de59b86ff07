"""The native decode path: on the CPU a token of a model with a block program is one call of a compiled library.

The library (`teal_kernels.native`) reads weights and norms where they lie in the model. What a block computes is data
(`teal_cli.decode.blocks`).
"""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from teal_cli.decode.activations import unknown_activation
from teal_cli.decode.cache import FixedCache, FixedLayer
from teal_cli.decode.departures import departure
from teal_cli.decode.native_cache import NativeCache
from teal_cli.decode.paths.native_program import NativeProgram
from teal_cli.decode.paths.native_session import NativeSession
from teal_cli.decode.paths.program import ProgramPath, is_spread, known_program, unsupported_rope, without_program
from teal_cli.decode.row_levels import RowLevels
from teal_cli.errors import MachineError
from teal_cli.models.layers import StackedLinear
from teal_cli.models.wide_products import is_slow
from teal_cli.ranks.group import ranks_of
from teal_cli.sparse import SparsityControl, sparse_layers
from teal_kernels import BackendUnavailableError
from teal_kernels.native.library import unavailable_reason
from teal_kernels.native.structures import DTYPES, MAX_ROWS

_ROPE_TYPES = ("longrope", "dynamic", "proportional")
"""Beside those that any path takes."""
_CALLS = {"converted": 8, "float32": 2, "narrow": 1}
"""Of the library, of up to `MAX_ROWS` tokens each, in which it reads a prompt sooner than transformers' forward.

A forward converts weights of 16 bits where the processor has no instructions for them, and codes, whatever its length.
In float32 it copies weights where there are fewer than 16 tokens, and is faster with 24. Where it multiplies 16 bits
as they are, that was not measured, and only what takes one call is read by the library.
SmolLM2-135M's shape, AVX2, two threads, milliseconds by forward and library: 64 tokens in bfloat16 294 and 246, in
int4:32 344 and 186; 16 tokens in float32 101 and 66, but 32 tokens in one thread 208 and 240.
"""


def unsupported_on_cpu(model: Any, dtype: torch.dtype, backend: str) -> str | None:
    """Why a model cannot take the native path on a CPU, wherever it is now; None where it can.

    Raises:
        MachineError: a variant of the library was asked for that cannot run here.
    """
    config, program = model.config.get_text_config(), known_program(model)
    if program is None:
        return without_program(model)
    if ranks_of(model) is not None:
        return "several processes hold the model"
    if backend not in ("auto", "cpu"):
        return f"backend {backend}"
    if dtype not in DTYPES:
        return f"dtype {str(dtype).removeprefix('torch.')}"
    activation = unknown_activation(config, program)
    reason = unsupported_rope(config, _ROPE_TYPES) if activation is None else f"activation {activation}"
    reason = reason or departure(model, program)
    if reason is not None:
        return reason
    try:
        missing = unavailable_reason()
    except BackendUnavailableError as error:
        raise MachineError(str(error)) from error
    return None if missing is None else f"several times slower: {missing}"


class NativePath(ProgramPath):
    """Decodes the tokens of one model by calls of the native library."""

    name = "native"
    reported = "native"
    devices = ("cpu",)
    spans_are_exact = True

    def __init__(self, model: Any, control: SparsityControl | None) -> None:
        super().__init__(model, control)
        self._dense: NativeProgram | None = None
        self._of_one_token: dict[torch.dtype, list[FixedLayer]] = {}

    @classmethod
    def unsupported(cls, model: Any, control: SparsityControl | None) -> str | None:
        """As `Path.unsupported`."""
        if is_spread(model):
            return "weights on several devices"
        if control is not None and any(isinstance(module, StackedLinear) for module in model.modules()):
            return "experts that the plan leaves out"
        parameter = next(model.parameters())
        if parameter.device.type != "cpu":
            return f"weights on {parameter.device.type}"
        return unsupported_on_cpu(model, parameter.dtype, "auto" if control is None else control.backend)

    def new_cache(self, length: int) -> NativeCache:
        """An empty cache."""
        return NativeCache(self.attentions, length, self.copies)

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, cache: FixedCache, lengths: list[int] | None) -> Tensor:
        """As `Path.prefill`: short prompts by the library, `MAX_ROWS` tokens in a pass, as drafts are verified.

        A pass costs about as much as two steps. The last one begins early enough to be whole, and writes once more what
        the one before it has written.
        """
        rows, tokens = input_ids.shape
        span = min(tokens, MAX_ROWS)
        if -(-rows // (MAX_ROWS // span)) * -(-tokens // span) > self._most_calls:
            return super().prefill(input_ids, cache, lengths)
        cache.check_extendable()
        before = cache.length
        if not cache.layers[0].is_initialized:
            cache.layers = [layer.like(rows, cache.positions) for layer in self._layers_of_one_token()]
        session = self.open_rows(cache, None, sparse=False, span=span)
        last = [before + length - 1 for length in lengths or [tokens] * rows]
        found = torch.empty(rows, session.logits.shape[1])
        for start in [*range(0, tokens - span, span), tokens - span]:
            at = before + start
            ending = [row for row in range(rows) if at <= last[row] < at + span]
            cache.shorten([at] * rows)
            session.place([at] * rows)
            session.computes_logits = bool(ending)
            session.step(input_ids[:, start : start + span].reshape(-1))
            for row in ending:
                found[row] = session.logits[row * span + last[row] - at]
        cache.shorten([position + 1 for position in last])
        return found

    def _layers_of_one_token(self) -> list[FixedLayer]:
        """From transformers' forward, which knows the shapes of the keys and values of each layer."""
        dtype = self.model.dtype
        if dtype not in self._of_one_token:
            cache = self.new_cache(1)
            super().prefill(torch.zeros(1, 1, dtype=torch.int64), cache, None)
            self._of_one_token[dtype] = cache.layers
        return self._of_one_token[dtype]

    @cached_property
    def _most_calls(self) -> int:
        """Of the library, in which it reads a prompt sooner than transformers' forward does."""
        if self.cannot_step_back_because() is not None:
            return 0
        if is_slow(self.model.dtype) or any(layer.packed is not None for layer in sparse_layers(self.model).values()):
            return _CALLS["converted"]
        return _CALLS["float32" if self.model.dtype == torch.float32 else "narrow"]

    def open(self, cache: NativeCache) -> NativeSession:
        """As `Path.open`, of any number of rows."""
        return self.open_rows(cache, None, sparse=self.control.decodes_sparse)

    def spans_for(self, sequences: int) -> tuple[int, ...]:
        """As `ProgramPath.spans_for`: the library pads rows to these."""
        return (1, 2, 4, 8)

    def open_rows(self, cache: FixedCache, levels: RowLevels | None, *, sparse: bool, span: int = 1) -> NativeSession:
        """As `ProgramPath.open_rows`."""
        program = self._program(sparse=True, levels=levels) if sparse else self._dense_program()
        return NativeSession(self, cache, program, sparse=sparse, span=span)

    def _program(self, *, sparse: bool, levels: RowLevels | None = None) -> NativeProgram:
        return NativeProgram(self.model, self.blocks, self.last_norm, sparse=sparse, levels=levels)

    def _dense_program(self) -> NativeProgram:
        """One for all prompts and dense sessions: it is made in 15 ms, in which a short prompt is read."""
        if self._dense is None or not self._dense.sources.is_current:
            self._dense = None  # before another one is held
            self._dense = self._program(sparse=False)
            self.control.prepared.add(self)
        return self._dense

    def let_go(self) -> None:
        """As `Prepared.let_go`."""
        self._dense = None
