"""Running text through a model of any kind: one place that knows how each is called.

A decoder reads a sequence. An encoder-decoder reads the first half of it with its encoder and the
second half with its decoder. An encoder reads it all and has no logits.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from teal_cli.errors import ArtefactError, UsageError
from teal_cli.models.architectures import architecture_for


class Halves(NamedTuple):
    """A batch of sequences as an encoder-decoder takes it."""

    source: Tensor
    """(batch, tokens // 2) int64: what the encoder reads."""
    start: Tensor
    """(batch, tokens - tokens // 2) int64: what the decoder reads, its start token first."""
    target: Tensor
    """The same shape: what the decoder is to say."""


def halves(model: Any, ids: Tensor) -> Halves:
    """Cut sequences for an encoder-decoder: (batch, tokens) int64."""
    source, target = ids.split([ids.shape[1] // 2, ids.shape[1] - ids.shape[1] // 2], dim=1)
    first = model.config.decoder_start_token_id or 0
    start = torch.cat([torch.full_like(target[:, :1], first), target[:, :-1]], dim=1)
    return Halves(source, start, target)


def position_limit(config: Any) -> int | None:
    """Positions that a model with this configuration was made for; None where it names no number."""
    text = config.get_text_config()
    found = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)  # MPT's
    return int(found) if found else None


def rope_of(config: Any) -> dict[str, Any]:
    """The `rope_parameters` of a decoder's configuration; empty where it has none."""
    return getattr(config, "rope_parameters", None) or {}


def check_context(limit: int, prompt_tokens: int, new_tokens: int, starts: int | None = None) -> None:
    """Refuse a prompt and a reply that a context does not hold.

    Args:
        limit: its positions.
        prompt_tokens: of the prompt.
        new_tokens: of the reply, at most.
        starts: of an encoder-decoder: tokens that its decoder reads first. Encoder and decoder have `limit` each.

    Raises:
        ArtefactError: they are longer.
    """
    if starts is None and prompt_tokens + new_tokens > limit:
        raise ArtefactError(
            f"{prompt_tokens} prompt tokens and {new_tokens} new ones exceed the model's context of {limit}: shorten "
            "the prompt or --max-new-tokens"
        )
    if starts is not None and max(prompt_tokens, new_tokens + starts) > limit:
        raise ArtefactError(
            f"{prompt_tokens} prompt tokens and {new_tokens} new ones do not fit: encoder and decoder have {limit} "
            "positions each; shorten the prompt or --max-new-tokens"
        )


def table_of_positions(model: Any) -> int | None:
    """Positions of a model (or its outline) that has a table of them; None where they have no end, as rotary ones."""
    limit = position_limit(model.config)
    tables = {
        module.num_embeddings
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module is not model.get_input_embeddings()
    }
    tables |= {len(buffer) for name, buffer in model.named_buffers() if name.endswith("embed_positions")}  # GPT-J's
    # Some tables begin with two rows for padding. MPT's forward makes a table for ALiBi, of all positions.
    ends = tables & {limit, (limit or 0) + 2} or model.config.model_type == "mpt"
    return limit if ends else None


def check_positions(model: Any, seq_len: int) -> None:
    """Refuse sequences for which a model has no positions.

    Raises:
        UsageError: a table of positions that is shorter than the sequences.
    """
    limit = table_of_positions(model)
    if limit is not None and seq_len > limit:
        raise UsageError(f"seq_len ({seq_len}, flag --seq-len) exceeds the {limit} positions of this model")


def run_text(model: Any, ids: Tensor, *, logits_to_keep: int = 1) -> Any:
    """One forward pass over whole sequences, without a cache.

    Args:
        model: a transformers model.
        ids: (batch, tokens) int64 on its device.
        logits_to_keep: last positions to have logits of, of a decoder; 0 for all.

    Returns:
        What the model returns: `logits`, or `last_hidden_state` of an encoder.
    """
    kind = architecture_for(model).kind
    if kind == "encoder":
        return model(input_ids=ids)
    if kind == "seq2seq":
        cut = halves(model, ids)
        return model(input_ids=cut.source, decoder_input_ids=cut.start, use_cache=False)
    return model(input_ids=ids, use_cache=False, logits_to_keep=logits_to_keep)


@contextmanager
def watched(model: Any, *, with_output: bool) -> Iterator[Callable[[Tensor], Any]]:
    """`run_text` for hooks that are registered before: what it returns has logits of the last position at most.

    Args:
        model: a transformers model.
        with_output: the output layer is watched too. It is then handed all positions, for the hooks on it so far,
            and makes logits of the last one alone: those of all are never held.
    """
    if not with_output:
        yield partial(run_text, model)
        return

    def last_position(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][..., -1:, :], *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(last_position)
    try:
        yield partial(run_text, model, logits_to_keep=0)
    finally:
        handle.remove()
