"""Decoding with an encoder-decoder: the encoder reads the prompt, the decoder writes from its start token on."""

from contextlib import nullcontext
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
        forced = getattr(model.generation_config, "forced_bos_token_id", None)
        self._forced: int | None = forced if isinstance(forced, int) else None

    def _state_names(self) -> None:
        """Of every encoder-decoder it is `past_key_values`, beside the encoder's states."""

    def check_length(self, prompt_tokens: int, new_tokens: int) -> None:
        """Fail where encoder or decoder have too few positions; each has as many. Relative ones (T5) have no end.

        Raises:
            ArtefactError: more positions than the model has.
        """
        longest = max(prompt_tokens, new_tokens + (1 if self._forced is None else 2))
        if longest > self.max_length:
            raise ArtefactError(
                f"{prompt_tokens} prompt tokens and {new_tokens} new ones do not fit: encoder and decoder have "
                f"{self.max_length} positions each; shorten the prompt or --max-new-tokens"
            )

    def new_cache(self, length: int) -> Any:
        """An empty cache, which grows."""
        return _Encoded(*(DynamicCache(config=self.model.config) for _ in range(2)))

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, cache: Any) -> Tensor:
        """Encode a prompt: (batch, tokens) int64 -> (batch, vocabulary) logits after the decoder's start token."""
        cache.prompt = self._encode(input_ids)
        return super().prefill(self._start(input_ids), cache)

    def _encode(self, input_ids: Tensor) -> Any:
        with self.control.dense() if self.control else nullcontext():
            return self.model.get_encoder()(input_ids=input_ids)

    def _start(self, input_ids: Tensor) -> Tensor:
        """(batch, 1 or 2) int64: what the decoder reads first, dense; BART is told the first token too."""
        forced = self._forced
        start = torch.full_like(input_ids[:, :1], self.model.config.decoder_start_token_id or 0)
        return start if forced is None else torch.cat([start, torch.full_like(start, forced)], dim=1)

    def _forward(self, input_ids: Tensor, cache: Any) -> Tensor:
        return self._run(input_ids, cache)[:, -1]

    def _run(self, input_ids: Tensor, cache: Any) -> Tensor:
        logits: Tensor = self.model(
            encoder_outputs=cache.prompt, decoder_input_ids=input_ids, past_key_values=cache, use_cache=True
        ).logits
        return logits

    @torch.no_grad()
    def without_cache(self, prompt: Tensor, tokens: Tensor) -> Tensor:
        """As of `Engine`. Sparse, the cache holds what the encoder and the start token gave, which stay dense."""
        if self.control is not None and self.control.decodes_sparse:
            cache = self.new_cache(tokens.shape[1])
            self.prefill(prompt, cache)
            with self.control.masked(0):
                logits: Tensor = self._run(tokens, cache)
            return logits
        ids = torch.cat([self._start(prompt), tokens], dim=1)
        output = self.model(encoder_outputs=self._encode(prompt), decoder_input_ids=ids, use_cache=False)
        return output.logits[:, -tokens.shape[1] :]  # type: ignore[no-any-return]


def engine_for(model: Any) -> Engine:
    """The engine that decodes a model.

    Raises:
        ArtefactError: an encoder, which does not decode.
    """
    try:
        kind = architecture_for(model).kind
    except ArtefactError:
        # A dense model of a type that teal does not know.
        kind = "seq2seq" if getattr(model.config, "is_encoder_decoder", False) else "causal"
    if kind == "encoder":
        raise ArtefactError("this model is an encoder: it writes no text (`teal eval` measures it)")
    return Seq2SeqEngine(model) if kind == "seq2seq" else Engine(model)
