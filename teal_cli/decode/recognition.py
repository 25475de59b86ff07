"""Whether a model computes what a block program says: each step alone, on what the model's own forward gave to it.

A few tokens go through transformers' forward, whose modules are listened to. Every step of every block is then computed
from what its module was given, so that a difference is one of this step and rounding does not add up.
"""

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

from teal_cli.decode.activations import activation_of, unknown_activation
from teal_cli.decode.blocks import (
    Attention,
    Norm,
    Product,
    block_steps,
    embedding_norm,
    last_norm,
    module_at,
    program_of,
)
from teal_cli.decode.departures import departure
from teal_cli.decode.positions import alibi_bias, growth_of, learned_positions, rotary_at
from teal_cli.decode.routes import Route
from teal_cli.decode.scales import scales_of
from teal_cli.models.architectures import Architecture, architecture_for, blocks_of
from teal_cli.models.block_calls import hidden_of, hooked
from teal_cli.models.forward import position_limit
from teal_cli.models.likeness import layers_of, steps_of
from teal_cli.models.programs import AttentionStep, NormStep, ProductStep
from teal_cli.sparse import control_of

TOKENS = 24
LIMIT = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.01}
"""Relative, of one step. Tiny models of all families give at most 2e-7, 0.009 and 0.001."""


def recognise_(model: Any) -> None:
    """Try the rows that a model of an unknown type is like, and keep the first one whose steps are the model's.

    Where there is none, the first row stays without its program, and `teal_differs` says at which step it is another.

    Args:
        model: that may have `teal_alike`, with its weights.
    """
    rows: dict[str, Architecture] = getattr(model, "teal_alike", {})
    if not rows or next(model.parameters()).is_meta:
        return
    del model.teal_alike
    reasons = {}
    for name, row in rows.items():
        model.teal_architecture = row
        reason = _why_not(model)
        if reason is None:
            return
        reasons[name] = reason
    (name, reason), *_ = reasons.items()
    model.teal_architecture = rows[name].model_copy(update={"program": None, "variants": ()})
    model.teal_differs = f"model type {model.config.model_type}, like {name} but for {reason}"


def _why_not(model: Any) -> str | None:
    program = program_of(model)
    if (reason := departure(model, program)) is not None:
        return reason
    if (activation := unknown_activation(model.config.get_text_config(), program)) is not None:
        return f"activation {activation}"
    return _windows(model) or first_difference(model)


def _windows(model: Any) -> str | None:
    """Layers that see fewer positions than the program says, or more, as transformers' own cache has them.

    A few tokens would not show it.
    """
    layers: list[Any] = DynamicCache(config=model.config.get_text_config()).layers
    expected = [int(getattr(layer, "sliding_window", None) or 0) for layer in layers]
    found = [step.window for steps in block_steps(model) for step in steps if isinstance(step, Attention)]
    return None if not layers or found == expected else "the windows of its layers"


@torch.no_grad()
def first_difference(model: Any) -> str | None:
    """The first step of a model's program that computes something else than the model's forward; None where none does.

    Of the first positions and, where they have angles, of the last ones: some models scale by positions there.

    Args:
        model: with a block program, on any one device. Sparse layers drop nothing meanwhile.
    """
    try:
        control = control_of(model)
    except LookupError:
        control = None
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(TOKENS, device=next(model.parameters()).device) * 7919 + 11)[None] % vocabulary
    far = (position_limit(model.config) or 0) - TOKENS if program_of(model).rotary is not None else 0
    with control.switched_off() if control else nullcontext():
        for start in (0, far) if far > 0 else (0,):
            if (found := next(_Check(model, ids, start).differences(), None)) is not None:
                return found
    return None


class _Call(NamedTuple):
    given: Tensor
    """(tokens, inputs)"""
    made: Tensor
    """(tokens, outputs)"""


class _Check:
    """One pass, and the steps that are tried on it: all in float32."""

    def __init__(self, model: Any, ids: Tensor, start: int) -> None:
        self.model, self.ids = model, ids[0]
        self.at = torch.arange(start, start + TOKENS, device=ids.device)
        """(tokens,) int64: positions."""
        self.program = program_of(model)
        self.limit = LIMIT.get(model.dtype, 1e-4)
        self.calls: dict[nn.Module, list[_Call]] = {}
        self.scales = scales_of(model, self.program)
        self.blocks = list(blocks_of(model).values())
        with hooked(self._hooks()):
            positions = {"position_ids": self.at[None]} if start else {}
            self.logits = model(input_ids=ids, use_cache=False, **positions).logits[0].float()

    def _hooks(self) -> Iterator[Any]:
        def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = args[0] if args else next(iter(kwargs.values()))
            if isinstance(given, Tensor) and isinstance(hidden_of(output), Tensor):
                self.calls.setdefault(module, []).append(_Call(_flat(given), _flat(hidden_of(output))))

        for module in {*self._listened(), *self.blocks, self.model.get_output_embeddings()}:
            yield module.register_forward_hook(called, with_kwargs=True)

    def _listened(self) -> Iterator[nn.Module]:
        row = architecture_for(self.model)
        yield module_at(self.model, self.program.norm)
        for block in self.blocks:
            for step in steps_of(self.program, block):
                names: Iterable[str | None] = ()
                if isinstance(step, NormStep):
                    names = (step.norm,)
                elif isinstance(step, ProductStep):
                    names = layers_of(row, step, block)
                yield from (module_at(block, name) for name in names if name is not None)

    def differences(self) -> Iterator[str]:
        """Every step that is another one, in order."""
        stream = self._embedded()
        for index, (block, steps) in enumerate(zip(self.blocks, block_steps(self.model), strict=True)):
            given, made = self._call(block)
            if self._differ(given, stream):
                yield f"what goes into block {index}"
            stream = given
            for what in self._of_block(block, steps, given, made):
                yield f"{what} of block {index}"
            stream = made
        norm = self._call(module_at(self.model, self.program.norm), last=True)
        if self._differ(norm.made, _normed(last_norm(self.model), stream)):
            yield f"norm {self.program.norm}"
        output = self._call(self.model.get_output_embeddings())
        logits = output.made * self.scales.logits
        if self.scales.logits_cap:
            logits = self.scales.logits_cap * torch.tanh(logits / self.scales.logits_cap)
        if self._differ(output.given, norm.made) or self._differ(self.logits, logits):
            yield "the logits"

    def _embedded(self) -> Tensor:
        """(tokens, hidden) of the first state of the residual stream."""
        table = self.model.get_input_embeddings().weight
        stream = table[self.ids].float() * self.scales.embedding
        if (learned := learned_positions(self.model)) is not None:
            stream = stream + learned[0][learned[1] : learned[1] + len(self.ids)].float()
        norm = embedding_norm(self.model)
        return stream if norm is None else _normed(norm, stream)

    def _of_block(self, block: nn.Module, steps: list[Any], stream: Tensor, after: Tensor) -> Iterator[str]:
        normed = aside = made = stream
        before = "attention"
        for step, named in zip(steps, steps_of(self.program, block), strict=True):
            if isinstance(step, Norm):
                found = _normed(step, stream)
                normed, aside = (normed, found) if step.aside else (found, aside)
                path = named.norm if isinstance(named, NormStep) else None
                if path is not None and self._differ(self._call(module_at(block, path)).made, found):
                    yield f"norm {path}"
            elif isinstance(step, Route) or (isinstance(step, Product) and step.experts):
                continue  # nothing is tried of experts, nor what they add
            elif isinstance(step, Attention) and isinstance(named, AttentionStep):
                made, before = self._attended(step, made, module_at(block, named.attention)), "attention"
            elif step.epilogue == "residual":
                call = self._call(step.layers[0])
                if self._differ(call.given, made if step.input_norm is None else _normed(step.input_norm, made)):
                    yield before
                added = call.made if step.norm is None else _normed(step.norm, call.made)
                if step.scaled_by is not None:
                    added = added * step.scaled_by(normed.to(step.scaled_by.weight.dtype)).float().sigmoid()
                stream = stream + self.scales.residual * added
                if step.stream_scale is not None:
                    stream = stream * step.stream_scale.float()
            else:
                calls = [self._call(layer) for layer in step.layers]
                if any(self._differ(call.given, aside if step.aside else normed) for call in calls):
                    yield f"what product {step.name} reads"
                made = _epilogue(step, torch.cat([call.made for call in calls], dim=1))
                before = f"product {step.name}"
        has_experts = any(isinstance(step, Route) for step in steps)
        if not has_experts and self._differ(after, stream):
            yield "what is added to the stream"

    def _attended(self, step: Attention, qkv: Tensor, module: Any) -> Tensor:
        """(tokens, heads * dim) of the plain product's outputs."""
        config, tokens = self.model.config.get_text_config(), len(qkv)
        heads = config.num_attention_heads
        dim = getattr(module, "head_dim", None) or config.hidden_size // heads
        kv_heads = (qkv.shape[1] // dim - heads) // (1 if step.keys_as_values else 2)
        group = heads // kv_heads
        if step.keys_as_values:
            qkv = torch.cat([qkv, qkv[:, heads * dim :]], dim=1)
        if step.clip:
            qkv = qkv.clamp(-step.clip, step.clip)
        if step.grouped:
            parts = qkv.view(tokens, kv_heads, group + 2, dim)
            q, k, v = parts[:, :, :group].flatten(1, 2), parts[:, :, group], parts[:, :, group + 1]
        else:
            q, k, v = qkv.split([heads * dim, kv_heads * dim, kv_heads * dim], dim=1)
            q, k, v = (part.view(tokens, -1, dim) for part in (q, k, v))
        norms = zip((q, k), (step.q_norms, step.k_norms), strict=True)
        if step.norms_of == "all_heads":
            q, k = (_normed(own[0], x.flatten(1)).view_as(x) if own else x for x, own in norms)
        elif step.norms_of == "heads":
            q, k = (_normed_heads(x, own) for x, own in norms)
        v = _normed_heads(v, step.v_norms)
        if step.rotates:
            q, k = (self._rotated(x, step) for x in (q, k))
        if step.norms_of == "rotated_heads":
            q, k = (_normed_heads(x, own) for x, own in zip((q, k), (step.q_norms, step.k_norms), strict=True))
        at = self.at
        if (growth := growth_of(self.model)) is not None:
            q = q * (1 + growth[0] * torch.log(1 + torch.floor(at / growth[1])))[:, None, None]
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * step.scale
        if step.cap:
            scores = step.cap * torch.tanh(scores / step.cap)
        if (bias := alibi_bias(self.model, tokens, heads, step.scale)) is not None:
            scores = scores + bias.to(scores.device)[:, None]
        distance = at[:, None] - at
        seen = (distance >= 0) & (distance < (step.window or tokens))
        scores = scores.masked_fill(~seen, float("-inf"))
        if step.sinks is not None:
            scores = torch.cat([scores, step.sinks.float()[:, None, None].expand(heads, tokens, 1)], dim=2)
        return torch.einsum("hqk,khd->qhd", scores.softmax(2)[..., :tokens], v).flatten(1)

    def _rotated(self, x: Tensor, step: Attention) -> Tensor:
        """(tokens, heads, dim), of which the first dimensions are turned."""
        tables = rotary_at(self.model, self.at, torch.float32, step.angles)
        if tables is None:
            return x
        cos, sin = (table[:, None] for table in tables)
        size, pairs = cos.shape[-1], self.program.pairs
        turned, rest = x[..., :size], x[..., size:]
        if pairs.startswith("neighbours"):
            if pairs == "neighbours":
                cos, sin = (table[..., : size // 2].repeat_interleave(2, dim=-1) for table in (cos, sin))
            other = torch.stack([-turned[..., 1::2], turned[..., ::2]], dim=-1).flatten(-2)
        else:
            other = torch.cat([-turned[..., size // 2 :], turned[..., : size // 2]], dim=-1)
        return torch.cat([turned * cos + other * sin, rest], dim=-1)

    def _call(self, module: nn.Module, *, last: bool = False) -> _Call:
        """What a module was given and made; nothing of one that was not called."""
        found = self.calls.get(module, [])
        return (
            found[-1 if last else 0] if found else _Call(torch.full((1, 1), torch.nan), torch.full((1, 1), torch.nan))
        )

    def _differ(self, found: Tensor, expected: Tensor) -> bool:
        if found.shape != expected.shape:
            return True
        error = (found - expected).norm() / expected.norm().clamp_min(1e-12)
        return not float(error) <= self.limit


def _flat(x: Tensor) -> Tensor:
    """In float32: a copy, since forwards write into what modules made (Falcon's)."""
    return x.detach().to(torch.float32, copy=True).flatten(0, -2)


def _normed(norm: Norm, x: Tensor) -> Tensor:
    if norm.identity:
        return x
    if norm.weight.shape[-1] != x.shape[-1]:  # of one head, or of all
        return torch.full_like(x, torch.nan)
    centred = x - x.mean(-1, keepdim=True) if norm.centred else x
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + norm.eps)
    y = y * (norm.weight.detach().float() + float(norm.plus_one))
    return y if norm.bias is None else y + norm.bias.detach().float()


def _normed_heads(x: Tensor, norms: tuple[Norm, ...]) -> Tensor:
    """(tokens, heads, dim), by one norm or each head's own."""
    if not norms:
        return x
    if len(norms) == 1:
        return _normed(norms[0], x)
    return torch.stack([_normed(norm, x[:, head]) for head, norm in enumerate(norms)], dim=1)


def _epilogue(product: Product, y: Tensor) -> Tensor:
    if product.epilogue == "plain":
        return y
    kind, threshold = activation_of(product)
    gate, up = y.chunk(2, dim=1) if product.epilogue == "gated" else (y, None)
    if kind == "xielu" and product.activation_module is not None:
        found: Tensor = product.activation_module(gate.to(product.layers[0].weight.dtype)).float()
    elif kind == "fatrelu":
        found = torch.where(gate < threshold, 0.0, gate)
    elif kind == "relu2":
        found = gate.relu().square()
    elif kind in ("gelu", "gelu_tanh"):
        found = F.gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none")
    else:
        found = F.silu(gate) if kind == "silu" else gate.relu()
    if up is None:
        return found
    return found * (up.relu() if kind == "drelu" else up)
