"""The first decoded steps against a forward that uses no cache: a state that gets lost must not pass as text.

transformers has over a hundred decoders. One that takes its state under another name, ignores it, or counts its
positions anew gives fluent nonsense and no error (issue 21).
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from teal_cli.checkpoint.rules import Dense
from teal_cli.decode.loop import TokenLoop
from teal_cli.decode.paths.base import Decoder
from teal_cli.decode.sampling import Sampler, SamplingConfig
from teal_cli.errors import ArtefactError, blame
from teal_cli.models.layers import Experts
from teal_cli.sparse import sparse_layers
from teal_cli.sparse.routed import RoutedMLP

PROMPT = 12
"""Tokens of the prompt that are tried."""
STEPS = 3
"""On a GPU the first is launched, the second captured, the third a replay."""

TOLERANCE = {
    False: {torch.float32: 0.02, torch.bfloat16: 0.15, torch.float16: 0.05},
    True: {torch.float32: 0.5, torch.bfloat16: 1.2, torch.float16: 1.2},
}
"""Most that the two may differ, dense (False) and sparse (True), as a share of the norm of the logits about their mean.

Measured, worst of 6 prompts: SmolLM2-135M dense 2e-6 in float32, 0.013 in bfloat16, 0.002 in float16; nine tiny random
models 1.1e-6, 0 and 6e-4. A lost state gives 1.07 on SmolLM2-135M, 0.25 (positions that start anew, MiniMax) to 1.4
(Mamba) on tiny models. Sparse, an input beside its threshold may fall on the other side by rounding, and others follow:
1.1e-6 in float32 as long as none does, but 0.3 on SmolLM2-135M and up to 0.84 (Mixtral) on tiny models in 16 bits.
There only logits that have nothing in common are refused (about 1.4): a state passes through the same code dense.
Mixtral's shapes with random weights differ dense by 0.62 in bfloat16 (H200): so does what chooses among experts.
"""


class OtherLogitsError(ArtefactError):
    """Decoding gives other logits than a pass over the whole text."""


@torch.no_grad()
def check_decoding(engine: Decoder, prompt: Tensor) -> None:
    """Decode a few tokens, and compare their logits with those of one pass over the whole sequence.

    The median of the steps counts, since one of them may choose other experts, or drop other inputs beside a
    threshold, by rounding. Nothing is counted, and no random number is drawn.

    Args:
        engine: on the path that is to be checked: dense, or sparse (then the pass drops inputs by masking).
        prompt: (batch, tokens) int64; its first tokens are enough.

    Raises:
        OtherLogitsError: they differ.
        ArtefactError: they are not numbers, or the model cannot take a step at all.
    """
    ids = prompt[:, : max(min(PROMPT, engine.max_length - STEPS), 1)].to(engine.device)
    if ids.shape[1] + STEPS > engine.max_length:
        return
    kind = engine.model.config.model_type
    if engine.path.own_kernels:
        got, expected = _both_ways(engine, ids)
    else:
        with blame(f"model type {kind} cannot be decoded token by token"):
            got, expected = _both_ways(engine, ids)
    errors = difference(got, expected).median(dim=1).values.max()
    sparse = engine.control is not None and engine.control.decodes_sparse
    # Rounding decides which of two experts is chosen whose scores are alike (of 16 bits), and whether a group is whose
    # logit is about 0; all blocks behind differ then.
    apart = (RoutedMLP,) if engine.model.dtype == torch.float32 else (RoutedMLP, Experts)
    chooses = any(isinstance(module, apart) for module in engine.model.modules())
    if float(errors) > TOLERANCE[sparse or chooses][engine.model.dtype]:
        way = (f"{engine.path.name} path, " if engine.path.own_kernels else "") + ("sparse" if sparse else "dense")
        raise OtherLogitsError(
            f"decoding a token of model type {kind} ({way}) does not give the logits of a pass over the whole text "
            f"(they differ by {float(errors):.0%}), so its replies would be wrong: "
            + (
                "use --backend reference, and report it"
                if engine.path.own_kernels
                else "its state does not last from token to token; use transformers' generate"
            )
        )


def difference(got: Tensor, expected: Tensor) -> Tensor:
    """How far logits are apart: (..., vocabulary) twice -> (...), a share of the expected ones' norm about their mean.

    Not about 0: a constant added to all logits changes no choice, and in some models it is most of the norm. Tokens
    that a model rules out (-inf) are left out.
    """
    found, wanted = got.float(), expected.float()
    finite = found.isfinite() & wanted.isfinite()
    count = finite.sum(-1, keepdim=True)
    found, wanted = (
        torch.where(finite, logits - (torch.where(finite, logits, 0.0).sum(-1, keepdim=True) / count), 0.0)
        for logits in (found, wanted)
    )
    error: Tensor = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp_min(1e-12)
    return error


def _both_ways(engine: Decoder, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(batch, STEPS, vocabulary) logits of steps after a prompt, and of a pass over all of it."""
    cache = engine.new_cache(ids.shape[1] + STEPS)
    sampler = Sampler(SamplingConfig(), engine.device)
    after_prompt = engine.prefill(ids, cache)
    engine.check_numbers(after_prompt)
    token = sampler.next_token(after_prompt)
    loop = TokenLoop(engine, cache, token, sampler)
    tokens, logits = [], []
    for _ in range(STEPS):
        tokens.append(token)
        token = loop.advance().clone()
        logits.append(loop.logits.clone())
    got = torch.stack(logits, dim=1)
    with _reading_whole(engine.model, loop.read_whole):
        expected = engine.without_cache(ids, torch.cat(tokens, dim=1))
    engine.check_numbers(torch.stack([got, expected.to(got.dtype)]))
    return got, expected


@contextmanager
def _reading_whole(model: Any, names: Collection[str]) -> Iterator[None]:
    """For a while, these projections drop nothing, as in the steps that are compared: where many are read whole because
    that is faster, steps are nearer to dense ones than to those that drop all that they may."""
    layers = [layer for name, layer in sparse_layers(model).items() if name in names]
    rules = [layer.rule for layer in layers]
    try:
        for layer in layers:
            layer.rule = Dense()
        yield
    finally:
        for layer, rule in zip(layers, rules, strict=True):
            layer.rule = rule
