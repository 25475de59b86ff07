"""The fused decode path: a token of a model with a block program in a few launches a block.

A block of the Llama family takes five:

    norm + q/k/v | rope + cache + attention | merge + o + residual | norm + gate/up + activation | down + residual

It works on the modules that `from_pretrained` gave: their weights are read where they lie, in one table for each
product (`teal_cli.sparse.merged`). What a block computes is data (`teal_cli.decode.blocks`). Nothing synchronises with
the host, so a token is one CUDA graph.
"""

from typing import Any

import torch
from torch import Tensor

from teal_cli.decode.blocks import Attention, Product, RMSNorm, block_steps, module_at, program_of, rms_norm
from teal_cli.decode.cache import FixedCache
from teal_cli.decode.paths.base import Path, last_of_rows
from teal_cli.decode.paths.fused_session import FusedSession
from teal_cli.errors import ArtefactError, UsageError
from teal_cli.models.architectures import architecture_for, find_projections
from teal_cli.sparse import SparseLinear, SparsityControl, lay_out_, replace_projections_
from teal_cli.sparse.gate_first import GateFirstMLP
from teal_kernels import backend_unavailable_reason
from teal_kernels.launching import hopper_or_later, interpreting
from teal_kernels.triton_gemv import MAX_ROWS
from teal_kernels.tuning_files import TuningTableError

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # angles that depend on the position alone
_ACTIVATIONS = ("silu", "swish")


def unsupported_on(model: Any, device: torch.device, dtype: torch.dtype, backend: str) -> str | None:
    """Why a model cannot take the fused path on a device, wherever it is now; None where it can."""
    config = model.config
    try:
        program = architecture_for(model).program
    except ArtefactError:
        program = None
    if program is None:
        return f"model type {config.model_type}"
    if device.type != "cuda" and not interpreting():
        return "no GPU"
    if backend not in ("auto", "triton"):
        return f"backend {backend}"
    if (reason := backend_unavailable_reason("triton", device, dtype)) is not None:
        return reason
    if any(isinstance(module, GateFirstMLP) for module in model.modules()):
        return "MLPs that decode gate first"
    for key in (step.activation for step in program.products if step.activation is not None):
        if (activation := getattr(config, key, None)) not in _ACTIVATIONS:
            return f"activation {activation}"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    return None if rope in _ROPE_TYPES else f"rope type {rope}"


class FusedPath(Path):
    """Launches the tokens of one model.

    The projections of a dense model become sparse layers that drop nothing, laid out for the kernels: their weights
    move, they are not copied.
    """

    name = "fused"
    devices = ("cuda",)  # the interpreter runs it on a CPU too, where it is asked for by name
    own_kernels = True
    sparse_may_lose = False  # each product is read whole where skipping does not pay (`choose_config`)
    control: SparsityControl

    def __init__(self, model: Any, control: SparsityControl | None) -> None:
        if control is None:
            control = replace_projections_(model, [projection.name for projection in find_projections(model)])
            lay_out_(model)
        super().__init__(model, control)
        self.dtype: torch.dtype = model.dtype
        self.pdl = hopper_or_later(self.device)
        self.blocks = block_steps(model)
        program = program_of(model)
        self.last_norm: RMSNorm = rms_norm(module_at(model, program.norm))
        self._rotary = module_at(model, program.rotary)

    @classmethod
    def unsupported(cls, model: Any, control: SparsityControl | None) -> str | None:
        """As `Path.unsupported`; sparse layers must lie as the kernels read them."""
        parameter = next(model.parameters())
        backend = "auto" if control is None else control.backend
        reason = unsupported_on(model, parameter.device, parameter.dtype, backend)
        if reason is not None:
            return reason
        if len({p.device for p in model.parameters()}) > 1 or any(hasattr(m, "_hf_hook") for m in model.modules()):
            return "weights on several devices"
        layers = [layer for layer in model.modules() if isinstance(layer, SparseLinear)]
        if not all(layer.merged.one_table or layer.is_output for layer in layers):
            return "projections that are not side by side"
        return None

    def output(self) -> Product | None:
        """Of an output layer that drops inputs by now, or is quantised; another one is read row by row, as it lies."""
        output = self.model.get_output_embeddings()
        if not isinstance(output, SparseLinear):
            return None
        output.merged.lay_out_()  # plans that were only set, and not applied, have left that to whom decodes
        return Product("output", [output], "plain") if output.merged.one_table else None

    def new_cache(self, length: int) -> FixedCache:
        """An empty cache."""
        layers = sum(isinstance(step, Attention) for steps in self.blocks for step in steps)
        return FixedCache(layers, length)

    def prefill(self, input_ids: Tensor, cache: FixedCache, lengths: list[int] | None) -> Tensor:
        """As `Path.prefill`, by transformers' forward. What follows a prompt cannot change what it is.

        So padding needs no mask: decoding overwrites its positions in the cache, and sees none that it has not.
        """
        cache.check_extendable()
        before = cache.length
        keep, own = (1, None) if lengths is None else last_of_rows(lengths, self.device)
        output = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=keep)
        logits: Tensor = output.logits
        if lengths is None or own is None:
            return logits[:, -1]
        cache.shorten([before + length for length in lengths])
        return logits[torch.arange(len(lengths), device=self.device), own]

    def open(self, cache: FixedCache) -> FusedSession:
        """As `Path.open`: at most `MAX_ROWS` rows, and the tuning table may be damaged."""
        rows = cache.layers[0].keys.shape[0]
        if rows > MAX_ROWS:
            raise UsageError(f"a batch of {rows} is more than the GPU kernels decode together ({MAX_ROWS})")
        try:
            return FusedSession(self, cache, rows)
        except TuningTableError as error:
            raise ArtefactError(str(error)) from error

    @torch.no_grad()
    def rotary(self, positions: int) -> tuple[Tensor, Tensor]:
        """cos and sin of every position: (positions, head size) each."""
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        index = torch.arange(positions, device=self.device)[None]
        cos, sin = self._rotary(like, index)
        return cos[0].contiguous(), sin[0].contiguous()
