"""The compact decode path: a token of a Llama-family model in five launches a block.

    norm + q/k/v | rope + cache + attention | o + residual | norm + gate/up + activation | down + residual

It works on the modules that `from_pretrained` gave: their weights are read where they lie, side by
side (`teal_cli.sparse.site`). Nothing synchronises with the host, so a token is one CUDA graph.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from teal_cli.decode.cache import FixedCache
from teal_cli.errors import ArtefactError
from teal_cli.sparse import SparseLinear, SparsityControl, SparsityCounter
from teal_kernels import backend_unavailable_reason
from teal_kernels.triton_decode import Best, decode_attention, embed, output_logits, pick
from teal_kernels.triton_gemv import MAX_ROWS, GemvConfig, Norm, Workspace, gemv, interpreting, squares_of
from teal_kernels.tuning import choose_config

_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # angles that depend on the position alone


def unsupported_reason(model: Any, control: SparsityControl) -> str | None:
    """Why a model cannot take the compact path; None where it can."""
    config = model.config
    parameter = next(model.parameters())
    if config.model_type not in _MODEL_TYPES:
        return f"model type {config.model_type}"
    if parameter.device.type != "cuda" and not interpreting():
        return "no GPU"
    if control.backend not in ("auto", "triton"):
        return f"backend {control.backend}"
    if (reason := backend_unavailable_reason("triton", parameter.device, parameter.dtype)) is not None:
        return reason
    if config.hidden_act not in ("silu", "swish"):
        return f"activation {config.hidden_act}"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in _ROPE_TYPES:
        return f"rope type {rope}"
    if len({p.device for p in model.parameters()}) > 1 or any(hasattr(m, "_hf_hook") for m in model.modules()):
        return "weights on several devices"
    if not all(layer.site.side_by_side for layer in model.modules() if isinstance(layer, SparseLinear)):
        return "projections that are not side by side"
    return None


class Product:
    """The projections of one site as one launch."""

    def __init__(self, layers: list[nn.Module], finish: str) -> None:
        self.layers: list[SparseLinear] = layers  # type: ignore[assignment]
        self.finish = finish
        first = self.layers[0]
        self.table = first.site.table
        self.parts = tuple(layer.out_features for layer in self.layers)
        self.bias = None
        if any(layer.bias is not None for layer in self.layers):
            self.bias = torch.cat(
                [layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in self.layers]
            )
        device = first.weight.device
        self.thresholds = torch.empty(len(self.parts), dtype=torch.float32, device=device)
        self.kept = torch.zeros(3, dtype=torch.int64, device=device)
        self.config: GemvConfig

    def prepare(self, enabled: bool, rows: int) -> None:
        """Take over thresholds, and choose how to run at the sparsity that they give."""
        plans = [layer.plan for layer in self.layers]
        values = [plan.threshold if enabled and plan.sparsity > 0 else -1.0 for plan in plans]
        self.thresholds.copy_(torch.tensor(values))
        sizes = [plan.sparsity * part if enabled else 0.0 for plan, part in zip(plans, self.parts, strict=True)]
        self.config = choose_config(
            self.table.device,
            inputs=self.table.shape[0],
            parts=self.parts,
            dtype=self.table.dtype,
            rows=rows,
            finish=self.finish,
            sparsity=sum(sizes) / sum(self.parts),
        )

    def run(self, x: Tensor, y: Tensor, workspace: Workspace, pdl: bool, norm: Norm | None, squares: Tensor | None) -> None:
        """Launch it."""
        gemv(
            x,
            self.table,
            self.parts,
            self.thresholds,
            y,
            self.config,
            workspace,
            bias=self.bias,
            norm=norm,
            finish=self.finish,
            squares=squares,
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

    @property
    def products(self) -> tuple[Product, ...]:
        return self.qkv, self.o, self.gate_up, self.down


def _window(config: Any, attention: nn.Module) -> int:
    """Positions that a layer sees; 0 for all."""
    default = config.sliding_window if config.model_type == "mistral" else None
    return int(getattr(attention, "sliding_window", default) or 0)


class CompactDecoder:
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
        self.pdl = self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) >= (9, 0)
        self.workspace = Workspace(self.device)
        self.kv_heads = config.num_key_value_heads
        self.blocks = []
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            self.blocks.append(
                _Block(
                    qkv=Product([attention.q_proj, attention.k_proj, attention.v_proj], "plain"),
                    o=Product([attention.o_proj], "residual"),
                    gate_up=Product([mlp.gate_proj, mlp.up_proj], "gated"),
                    down=Product([mlp.down_proj], "residual"),
                    attention_norm=layer.input_layernorm.weight,
                    mlp_norm=layer.post_attention_layernorm.weight,
                    eps=layer.input_layernorm.variance_epsilon,
                    q_norm=attention.q_norm.weight if hasattr(attention, "q_norm") else None,
                    k_norm=attention.k_norm.weight if hasattr(attention, "k_norm") else None,
                    window=_window(config, attention),
                    scale=attention.scaling,
                )
            )

    def new_cache(self, positions: int) -> FixedCache:
        """An empty cache."""
        return FixedCache(len(self.blocks), positions)

    def open(self, cache: FixedCache) -> "Session":
        """Begin to decode after what the cache holds.

        Raises:
            ArtefactError: more rows than the kernels take.
        """
        rows = cache.layers[0].keys.shape[0]  # type: ignore[union-attr]
        if rows > MAX_ROWS:
            raise ArtefactError(f"a batch of {rows} is more than the GPU kernels decode together ({MAX_ROWS})")
        return Session(self, cache, rows)

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

    def __init__(self, decoder: CompactDecoder, cache: FixedCache, rows: int) -> None:
        self.decoder, self.cache, self.rows = decoder, cache, rows
        self._made_for = decoder.control.decoding
        self.enabled = decoder.control.decodes_sparse
        config, device, dtype = decoder.model.config, decoder.device, decoder.dtype
        for block in decoder.blocks:
            for product in block.products:
                product.prepare(self.enabled, rows)
        block = decoder.blocks[0]

        def buffer(columns: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.empty(rows, columns, dtype=kind, device=device)

        self.token = torch.zeros(rows, dtype=torch.int64, device=device)
        self.position = torch.tensor([cache.length - 1], dtype=torch.int32, device=device)
        self.cos, self.sin = decoder.rotary(cache.positions)
        self.hidden = buffer(config.hidden_size)
        self.qkv = buffer(sum(block.qkv.parts))
        self.attended = buffer(block.o.table.shape[0])
        self.activation = buffer(block.gate_up.parts[0])
        self.logits = buffer(decoder.model.get_output_embeddings().weight.shape[0])
        self.best = Best.empty(rows, self.logits.shape[1], device)
        self.squares = buffer(1, torch.float32)
        self.squares_after_o = buffer(squares_of(block.o.parts, block.o.config), torch.float32)
        self.squares_after_down = buffer(squares_of(block.down.parts, block.down.config), torch.float32)
        self._length = cache.length
        self._counter: SparsityCounter | None = None
        self._before = self.position  # set with the counter
        self._counted = 0

    @torch.no_grad()
    def launch(self) -> Tensor:
        """One token for every row: `token` in, (rows, vocabulary) logits out; nothing waits."""
        decoder, workspace, pdl = self.decoder, self.decoder.workspace, self.decoder.pdl
        hidden = self.hidden
        embed(self.token, decoder.model.get_input_embeddings().weight, self.position, hidden, self.squares, pdl=pdl)
        squares = self.squares
        for block, layer in zip(decoder.blocks, self.cache.layers, strict=True):
            norm = Norm(block.attention_norm, block.eps, squares)
            block.qkv.run(hidden, self.qkv, workspace, pdl, norm, None)
            decode_attention(
                self.qkv,
                layer.keys,
                layer.values,
                self.position,
                self.cos,
                self.sin,
                self.attended,
                workspace,
                scale=block.scale,
                window=block.window,
                q_norm=block.q_norm,
                k_norm=block.k_norm,
                eps=block.eps,
                pdl=pdl,
            )
            block.o.run(self.attended, hidden, workspace, pdl, None, self.squares_after_o)
            norm = Norm(block.mlp_norm, block.eps, self.squares_after_o)
            block.gate_up.run(hidden, self.activation, workspace, pdl, norm, None)
            block.down.run(self.activation, hidden, workspace, pdl, None, self.squares_after_down)
            squares = self.squares_after_down
        last, output = decoder.model.model.norm, decoder.model.get_output_embeddings()
        norm = Norm(last.weight, last.variance_epsilon, squares)
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
        """Before a launch or replay: let the counter of the moment count it."""
        counter = self.decoder.control.counter
        if not self.enabled or counter is None:
            self._counter = None
        elif counter is not self._counter:
            self._counter, self._before, self._counted = counter, self._kept(), 0
            counter.add_source(self._tally)
        self._counted += 1

    def end(self) -> None:
        """After a launch or replay."""
        self.cache.advance()
        self._length += 1

    def _kept(self) -> Tensor:
        """(products, 3) int64 on the device: inputs kept so far."""
        return torch.stack([product.kept for block in self.decoder.blocks for product in block.products])

    def _tally(self) -> dict[str, tuple[int, int, int]]:
        """Projection -> its parameters, inputs seen and inputs dropped since counting began."""
        tallies = {}
        kept = (self._kept() - self._before).tolist()
        products = [product for block in self.decoder.blocks for product in block.products]
        for product, counts in zip(products, kept, strict=True):
            for layer, count in zip(product.layers, counts[: len(product.layers)], strict=True):
                seen = self._counted * self.rows * layer.in_features
                if layer.plan.sparsity > 0:
                    dropped = 0 if product.config.dense else seen - count
                    tallies[layer.name] = (layer.weight.numel(), seen, dropped)
        return tallies
