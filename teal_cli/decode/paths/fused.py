"""The fused decode path: a token of a Llama-family model in five launches a block.

    norm + q/k/v | rope + cache + attention | merge + o + residual | norm + gate/up + activation | down + residual

It works on the modules that `from_pretrained` gave: their weights are read where they lie, side by
side (`teal_cli.sparse.site`). Nothing synchronises with the host, so a token is one CUDA graph.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from teal_cli.decode.cache import FixedCache
from teal_cli.errors import ArtefactError, UsageError
from teal_cli.models.architectures import architecture_for
from teal_cli.sparse import SparseLinear, SparsityControl, SparsityCounter
from teal_cli.sparse.gate_first import GateFirstMLP
from teal_kernels import backend_unavailable_reason
from teal_kernels.launching import hopper_or_later, interpreting
from teal_kernels.packed_linear import fitting
from teal_kernels.triton_decode import (
    LOGITS_BLOCK,
    Best,
    attention_splits,
    decode_attention,
    embed,
    find_best,
    output_logits,
    pick,
)
from teal_kernels.triton_gemv import MAX_ROWS, Heads, Norm, Scratch, gemv, squares_of
from teal_kernels.tuning import choose_config
from teal_kernels.tuning_entries import kind_of
from teal_kernels.tuning_files import TuningTableError

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # angles that depend on the position alone
EPILOGUES = {
    "attention_input": "plain",
    "attention_output": "residual",
    "mlp_input": "gated",
    "mlp_intermediate": "residual",
}
"""What follows the product of each site, as `gemv` takes it."""


def unsupported_on(model: Any, device: torch.device, dtype: torch.dtype, backend: str) -> str | None:
    """Why a model cannot take the fused path on a device, wherever it is now; None where it can."""
    config = model.config
    try:
        known = architecture_for(model).compact
    except ArtefactError:
        known = False
    if not known:
        return f"model type {config.model_type}"
    if device.type != "cuda" and not interpreting():
        return "no GPU"
    if backend not in ("auto", "triton"):
        return f"backend {backend}"
    if (reason := backend_unavailable_reason("triton", device, dtype)) is not None:
        return reason
    if any(isinstance(module, GateFirstMLP) for module in model.modules()):
        return "MLPs that decode gate first"
    if config.hidden_act not in ("silu", "swish"):
        return f"activation {config.hidden_act}"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    return None if rope in _ROPE_TYPES else f"rope type {rope}"


def unsupported_reason(model: Any, control: SparsityControl) -> str | None:
    """Why a model cannot take the fused path; None where it can."""
    parameter = next(model.parameters())
    reason = unsupported_on(model, parameter.device, parameter.dtype, control.backend)
    if reason is not None:
        return reason
    if len({p.device for p in model.parameters()}) > 1 or any(hasattr(m, "_hf_hook") for m in model.modules()):
        return "weights on several devices"
    layers = [layer for layer in model.modules() if isinstance(layer, SparseLinear)]
    if not all(layer.site.side_by_side or layer.is_output for layer in layers):
        return "projections that are not side by side"
    return None


class Product:
    """The projections of one site, which one launch computes."""

    def __init__(self, layers: list[nn.Module], epilogue: str) -> None:
        self.layers: list[SparseLinear] = layers  # type: ignore[assignment]
        self.epilogue = epilogue
        self.table = self.layers[0].site.table
        self.parts = tuple(layer.out_features for layer in self.layers)
        self.bias: Tensor | None = None
        if any(layer.bias is not None for layer in self.layers):
            dtype = next(layer.bias.dtype for layer in self.layers if layer.bias is not None)
            biases = [
                torch.zeros(layer.out_features, dtype=dtype, device=self.table.device)
                if layer.bias is None
                else layer.bias.detach()
                for layer in self.layers
            ]
            self.bias = torch.cat(biases)


class Launch:
    """A product as one session runs it: thresholds, and the cut that fits the sparsity they give.

    Args:
        product: what is launched.
        enabled: False runs it dense.
        rows: of the batch.
        dtype: of the hidden states.
    """

    def __init__(self, product: Product, enabled: bool, rows: int, dtype: torch.dtype) -> None:
        self.product = product
        table, parts = product.table, product.parts
        plans = [layer.plan for layer in product.layers]
        values = [plan.threshold if enabled and plan.sparsity > 0 else -1.0 for plan in plans]
        self.thresholds = torch.tensor(values, dtype=torch.float32, device=table.device)
        self.kept = torch.zeros(3, dtype=torch.int64, device=table.device)
        """Inputs that were kept, for each part; added to by every launch that skips."""
        skipped = sum(plan.sparsity * part for plan, part in zip(plans, parts, strict=True)) if enabled else 0.0
        config = choose_config(
            table.device,
            inputs=table.shape[0],
            parts=parts,
            dtype=kind_of(table),
            rows=rows,
            epilogue=product.epilogue,
            sparsity=skipped / sum(parts),
        )
        self.config = fitting(config, table, rows)
        self.squares = torch.empty(
            rows, squares_of(table, parts, self.config, rows, dtype), dtype=torch.float32, device=table.device
        )
        """Partial sums of squares of what a `residual` launch wrote, for the norm that follows."""

    def run(self, x: Tensor | Heads, y: Tensor, scratch: Scratch, pdl: bool, norm: Norm | None = None) -> None:
        """Launch it."""
        gemv(
            x,
            self.product.table,
            self.product.parts,
            self.thresholds,
            y,
            self.config,
            scratch,
            bias=self.product.bias,
            norm=norm,
            epilogue=self.product.epilogue,
            squares=self.squares if self.product.epilogue == "residual" else None,
            counts=self.kept,
            pdl=pdl,
        )


@dataclass(frozen=True)
class _Block:
    """One decoder block."""

    qkv: Product
    o: Product
    gate_up: Product
    down: Product
    attention_norm: Tensor
    mlp_norm: Tensor
    eps: float
    q_norm: Tensor | None
    k_norm: Tensor | None
    window: int
    scale: float


def _window(config: Any, attention: nn.Module) -> int:
    """Positions that a layer sees; 0 for all."""
    default = config.sliding_window if config.model_type == "mistral" else None
    return int(getattr(attention, "sliding_window", default) or 0)


class FusedDecoder:
    """Launches the tokens of one model.

    Args:
        model: with sparse layers (of any sparsity, zero too) whose weights lie side by side.
        control: theirs.
    """

    def __init__(self, model: Any, control: SparsityControl) -> None:
        self.model, self.control = model, control
        config = model.config
        self.device = next(model.parameters()).device
        self.dtype: torch.dtype = model.dtype
        self.pdl = hopper_or_later(self.device)
        self.blocks = []
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            self.blocks.append(
                _Block(
                    qkv=Product([attention.q_proj, attention.k_proj, attention.v_proj], EPILOGUES["attention_input"]),
                    o=Product([attention.o_proj], EPILOGUES["attention_output"]),
                    gate_up=Product([mlp.gate_proj, mlp.up_proj], EPILOGUES["mlp_input"]),
                    down=Product([mlp.down_proj], EPILOGUES["mlp_intermediate"]),
                    attention_norm=layer.input_layernorm.weight,
                    mlp_norm=layer.post_attention_layernorm.weight,
                    eps=layer.input_layernorm.variance_epsilon,
                    q_norm=attention.q_norm.weight if hasattr(attention, "q_norm") else None,
                    k_norm=attention.k_norm.weight if hasattr(attention, "k_norm") else None,
                    window=_window(config, attention),
                    scale=attention.scaling,
                )
            )

    def output(self) -> Product | None:
        """Of an output layer that drops inputs by now, or is quantised; another one is read row by row, as it lies."""
        output = self.model.get_output_embeddings()
        if not isinstance(output, SparseLinear):
            return None
        output.site.lay_out_()  # plans that were only set, and not applied, have left that to whom decodes
        return Product([output], "plain") if output.site.side_by_side else None

    def new_cache(self, positions: int) -> FixedCache:
        """An empty cache."""
        return FixedCache(len(self.blocks), positions)

    def open(self, cache: FixedCache) -> "Session":
        """Begin to decode after what the cache holds.

        Raises:
            UsageError: more rows than the kernels take.
            ArtefactError: a damaged tuning table.
        """
        rows = cache.layers[0].keys.shape[0]
        if rows > MAX_ROWS:
            raise UsageError(f"a batch of {rows} is more than the GPU kernels decode together ({MAX_ROWS})")
        try:
            return Session(self, cache, rows)
        except TuningTableError as error:
            raise ArtefactError(str(error)) from error

    @torch.no_grad()
    def rotary(self, positions: int) -> tuple[Tensor, Tensor]:
        """cos and sin of every position: (positions, head size) each."""
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        index = torch.arange(positions, device=self.device)[None]
        cos, sin = self.model.model.rotary_emb(like, index)
        return cos[0].contiguous(), sin[0].contiguous()


class Session:
    """Decoding of one batch of sequences: the buffers between the launches.

    What is chosen at its start (thresholds, dense or sparse, cuts of the products) stays: open a new
    one after the plan or the control changed.
    """

    def __init__(self, decoder: FusedDecoder, cache: FixedCache, rows: int) -> None:
        self.decoder, self.cache, self.rows = decoder, cache, rows
        self._made_for = decoder.control.decoding
        self.enabled = decoder.control.decodes_sparse
        config, device, dtype = decoder.model.config, decoder.device, decoder.dtype
        self.scratch = Scratch(device)  # of its own: a captured graph holds its addresses
        self.launches = [
            tuple(
                Launch(product, self.enabled, rows, dtype)
                for product in (block.qkv, block.o, block.gate_up, block.down)
            )
            for block in decoder.blocks
        ]
        output = decoder.output()
        self.output = None if output is None else Launch(output, self.enabled, rows, dtype)
        block = decoder.blocks[0]

        def buffer(columns: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.empty(rows, columns, dtype=kind, device=device)

        self.token = torch.zeros(rows, dtype=torch.int64, device=device)
        self.position = torch.tensor([cache.length - 1], dtype=torch.int32, device=device)
        self.cos, self.sin = decoder.rotary(cache.positions)
        self.hidden = buffer(config.hidden_size)
        self.qkv = buffer(sum(block.qkv.parts))
        _, kv_heads, _, dim = cache.layers[0].keys.shape
        query_heads, splits = block.o.table.shape[0] // dim, attention_splits(rows * kv_heads)
        heads = Heads.empty(rows, query_heads, dim, splits, self.position)
        self.heads = [replace(heads, window=block.window) for block in decoder.blocks]
        self.activation = buffer(block.gate_up.parts[0])
        self.logits = buffer(decoder.model.get_output_embeddings().out_features)
        block_of_logits = LOGITS_BLOCK if self.output is not None else 0
        self.best = Best.empty(rows, self.logits.shape[1], device, block=block_of_logits)
        self.squares = buffer(1, torch.float32)
        self._length = cache.length
        self._count: _Count | None = None

    @torch.no_grad()
    def launch(self) -> Tensor:
        """One token for every row: `token` in, (rows, vocabulary) logits out; nothing waits."""
        decoder, scratch, pdl = self.decoder, self.scratch, self.decoder.pdl
        hidden = self.hidden
        embed(self.token, decoder.model.get_input_embeddings().weight, self.position, hidden, self.squares, pdl=pdl)
        squares = self.squares
        steps = zip(decoder.blocks, self.launches, self.heads, self.cache.layers, strict=True)
        for block, launches, heads, layer in steps:
            qkv, o, gate_up, down = launches
            qkv.run(hidden, self.qkv, scratch, pdl, Norm(block.attention_norm, block.eps, squares))
            decode_attention(
                self.qkv,
                layer.keys,
                layer.values,
                self.cos,
                self.sin,
                heads,
                scale=block.scale,
                q_norm=block.q_norm,
                k_norm=block.k_norm,
                eps=block.eps,
                pdl=pdl,
            )
            o.run(heads, hidden, scratch, pdl)
            norm = Norm(block.mlp_norm, block.eps, o.squares)
            gate_up.run(hidden, self.activation, scratch, pdl, norm)
            down.run(self.activation, hidden, scratch, pdl)
            squares = down.squares
        last, output = decoder.model.model.norm, decoder.model.get_output_embeddings()
        norm = Norm(last.weight, last.variance_epsilon, squares)
        if self.output is not None:
            self.output.run(hidden, self.logits, scratch, pdl, norm)
            find_best(self.logits, self.best, pdl=pdl)
            return self.logits
        output_logits(hidden, norm, output.weight, output.bias, self.logits, self.best, pdl=pdl)
        return self.logits

    def pick(self) -> None:
        """Make the greedy choice from the last launch's logits the next launch's `token`."""
        pick(self.best, self.token, pdl=self.decoder.pdl)

    @property
    def stale(self) -> bool:
        """Whether plan, control or cache have changed since."""
        return self._made_for != self.decoder.control.decoding or self._length != self.cache.length

    def step(self, token: Tensor) -> Tensor:
        """(rows, 1) int64 -> (rows, vocabulary) logits, in a buffer that the next step overwrites."""
        self.token.copy_(token.view(-1))
        self.begin()
        logits = self.launch()
        self.end()
        return logits

    def begin(self) -> None:
        """Before a launch or replay: make sure of its position, and let the counter of the moment count it.

        Raises:
            ArtefactError: the cache is full.
        """
        if self.cache.length >= self.cache.positions:
            raise ArtefactError(f"the KV cache is full: it was made for {self.cache.positions} positions")
        counter = self.decoder.control.counter
        if self._count is not None and counter is not self._count.counter:
            self._count.stop()
            self._count = None
        if self.enabled and counter is not None and self._count is None:
            self._count = _Count(self, counter)
            counter.add_source(self._count.tally)
        if self._count is not None:
            self._count.steps += 1

    def end(self) -> None:
        """After a launch or replay."""
        self.cache.advance()
        self._length += 1


class _Count:
    """What one counter sees of a session: the steps since it came."""

    def __init__(self, session: Session, counter: SparsityCounter) -> None:
        self.counter = counter
        self.steps = 0
        self._rows = session.rows
        self._launches = [launch for launches in session.launches for launch in launches]
        if session.output is not None and session.output.product.layers[0].is_planned:
            self._launches.append(session.output)
        self._before = self._kept()
        self._after: Tensor | None = None

    def _kept(self) -> Tensor:
        """(launches, 3) int64 on the device: inputs kept so far."""
        return torch.stack([launch.kept for launch in self._launches])

    def stop(self) -> None:
        """Steps from now on are not this counter's."""
        self._after = self._kept()

    def tally(self) -> dict[str, tuple[int, int, int]]:
        """Projection -> its parameters, inputs seen and inputs dropped."""
        tallies = {}
        kept = ((self._kept() if self._after is None else self._after) - self._before).tolist()
        for launch, counts in zip(self._launches, kept, strict=True):
            for layer, count in zip(launch.product.layers, counts, strict=False):
                seen = self.steps * self._rows * layer.in_features
                dropped = 0 if launch.config.dense else seen - count
                tallies[layer.name] = (layer.in_features * layer.out_features, seen, dropped)
        return tallies
