"""Decoding with an encoder-decoder: the encoder reads the prompt, the decoder writes from its start token on."""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from teal_cli.decode.engine import Engine
from teal_cli.errors import ArtefactError
from teal_cli.models.architectures import architecture_for


class _Encoded(EncoderDecoderCache):
    """A cache that also holds what the encoder made of the prompt."""

    prompt: Any = None


class Seq2SeqEngine(Engine):
    """An `Engine` whose prompt is the encoder's: it and the start token run dense, every step after them sparse."""

    captures = False  # its cache grows

    def __init__(self, model: Any) -> None:
        super().__init__(model, compact=False)

    @property
    def max_length(self) -> int:
        """No limit: positions are relative."""
        return 1 << 31

    def new_cache(self, length: int) -> Any:
        """An empty cache, which grows."""
        return _Encoded(*(DynamicCache(config=self.model.config) for _ in range(2)))

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, cache: Any) -> Tensor:
        """Encode a prompt: (batch, tokens) int64 -> (batch, vocabulary) logits after the decoder's start token."""
        first = self.model.config.decoder_start_token_id or 0
        start = torch.full_like(input_ids[:, :1], first)
        if self.control is None:
            cache.prompt = self.model.get_encoder()(input_ids=input_ids)
        else:
            with self.control.dense():
                cache.prompt = self.model.get_encoder()(input_ids=input_ids)
        return super().prefill(start, cache)

    def _forward(self, input_ids: Tensor, cache: Any) -> Tensor:
        output = self.model(
            encoder_outputs=cache.prompt, decoder_input_ids=input_ids, past_key_values=cache, use_cache=True
        )
        logits: Tensor = output.logits[:, -1]
        return logits


def engine_for(model: Any) -> Engine:
    """The engine that decodes a model.

    Raises:
        ArtefactError: an encoder, which does not decode.
    """
    try:
        kind = architecture_for(model).kind
    except ArtefactError:
        kind = "causal"  # a dense model of a type that teal does not know
    if kind == "encoder":
        raise ArtefactError("this model is an encoder: it writes no text (`teal eval` measures it)")
    return Seq2SeqEngine(model) if kind == "seq2seq" else Engine(model)
