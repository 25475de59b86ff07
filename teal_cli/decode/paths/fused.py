"""The fused decode path: a token of a model with a block program in a few launches a block.

A block of the Llama family takes five:

    norm + q/k/v | rope + cache + attention | merge + o + residual | norm + gate/up + activation | down + residual

The weights of each product lie in one table (`teal_cli.sparse.merged`). What a block computes is data
(`teal_cli.decode.blocks`). Nothing synchronises with the host, so a token is one CUDA graph.
"""

from typing import Any

import torch

from teal_cli.decode.blocks import Product, block_steps, program_of, scales_of, unknown_activation
from teal_cli.decode.cache import FixedCache
from teal_cli.decode.departures import departure
from teal_cli.decode.paths.fused_session import FusedSession
from teal_cli.decode.paths.fused_steps import cannot_launch
from teal_cli.decode.paths.program import ProgramPath, is_spread, known_program, unsupported_rope
from teal_cli.errors import ArtefactError, UsageError
from teal_cli.sparse import SparseLinear, SparsityControl
from teal_cli.sparse.gate_first import GateFirstMLP
from teal_kernels import backend_unavailable_reason
from teal_kernels.launching import hopper_or_later, interpreting
from teal_kernels.triton_gemv import MAX_ROWS
from teal_kernels.tuning_files import TuningTableError


def unsupported_on(model: Any, device: torch.device, dtype: torch.dtype, backend: str) -> str | None:
    """Why a model cannot take the fused path on a device, wherever it is now; None where it can."""
    config, program = model.config.get_text_config(), known_program(model)
    if program is None or not program.fused:
        return f"model type {model.config.model_type}"
    if any(step.experts or step.scaled_by for step in program.products):
        return "experts"
    if device.type != "cuda" and not interpreting():
        return "no GPU"
    if backend not in ("auto", "triton"):
        return f"backend {backend}"
    if (reason := backend_unavailable_reason("triton", device, dtype)) is not None:
        return reason
    if any(isinstance(module, GateFirstMLP) for module in model.modules()):
        return "MLPs that decode gate first"
    if (activation := unknown_activation(config, program)) is not None:
        return f"activation {activation}"
    return unsupported_rope(config, ("longrope",)) or departure(model, program)


class FusedPath(ProgramPath):
    """Launches the tokens of one model."""

    name = "fused"
    reported = "compact"
    devices = ("cuda",)  # the interpreter runs it on a CPU too, where it is asked for by name
    sparse_may_lose = False  # each product is read whole where skipping does not pay (`choose_config`)

    def __init__(self, model: Any, control: SparsityControl | None) -> None:
        super().__init__(model, control)
        self.dtype: torch.dtype = model.dtype
        self.scales = scales_of(model, program_of(model))
        self.pdl = hopper_or_later(self.device)

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
        if not all(layer.merged.one_table or layer.is_output for layer in layers):
            return "projections that are not side by side"
        products = (step for block in block_steps(model) for step in block if isinstance(step, Product))
        return next((reason for product in products if (reason := cannot_launch(product)) is not None), None)

    def output(self) -> Product | None:
        """Of an output layer that drops inputs by now, or is quantised; another one is read row by row, as it lies."""
        output = self.model.get_output_embeddings()
        if not isinstance(output, SparseLinear):
            return None
        output.merged.lay_out_()  # plans that were only set, and not applied, have left that to whom decodes
        return Product("output", (output,), "plain") if output.merged.one_table else None

    def new_cache(self, length: int) -> FixedCache:
        """An empty cache."""
        return FixedCache(self.attentions, length)

    def open(self, cache: FixedCache) -> FusedSession:
        """As `Path.open`: at most `MAX_ROWS` rows, and the tuning table may be damaged."""
        rows = cache.layers[0].keys.shape[0]
        if rows > MAX_ROWS:
            raise UsageError(f"a batch of {rows} is more than the GPU kernels decode together ({MAX_ROWS})")
        try:
            return FusedSession(self, cache, rows)
        except TuningTableError as error:
            raise ArtefactError(str(error)) from error
