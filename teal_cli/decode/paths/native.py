"""The native decode path: on the CPU a token of a model with a block program is one call of a compiled library.

The library (`teal_kernels.native`) reads weights and norms where they lie in the model. What a block computes is data
(`teal_cli.decode.blocks`).
"""

from typing import Any

import torch

from teal_cli.decode.activations import unknown_activation
from teal_cli.decode.cache import FixedCache
from teal_cli.decode.departures import departure
from teal_cli.decode.native_cache import NativeCache
from teal_cli.decode.paths.native_session import NativeSession
from teal_cli.decode.paths.program import ProgramPath, is_spread, known_program, unsupported_rope, without_program
from teal_cli.decode.paths.program_session import ProgramSession
from teal_cli.decode.row_levels import RowLevels
from teal_cli.errors import MachineError
from teal_cli.models.layers import StackedLinear
from teal_cli.ranks.group import ranks_of
from teal_cli.sparse import SparsityControl
from teal_kernels import BackendUnavailableError
from teal_kernels.native.library import unavailable_reason
from teal_kernels.native.structures import DTYPES

_ROPE_TYPES = ("longrope", "dynamic", "proportional")
"""Beside those that any path takes."""


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

    def open(self, cache: NativeCache) -> NativeSession:
        """As `Path.open`, of any number of rows."""
        return NativeSession(self, cache)

    def spans_for(self, sequences: int) -> tuple[int, ...]:
        """As `ProgramPath.spans_for`: the library pads rows to these."""
        return (1, 2, 4, 8)

    def open_rows(
        self,
        cache: FixedCache,
        levels: RowLevels | None,
        *,
        sparse: bool,
        span: int = 1,
        like: ProgramSession | None = None,
    ) -> NativeSession:
        """As `ProgramPath.open_rows`."""
        other = like if isinstance(like, NativeSession) else None
        return NativeSession(self, cache, levels if sparse else None, sparse=sparse, like=other, span=span)
