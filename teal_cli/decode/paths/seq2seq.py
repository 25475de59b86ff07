"""The general path of an encoder-decoder: the encoder reads the prompt, the decoder writes from its start token on."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from teal_cli.decode.paths.base import refuse_lengths
from teal_cli.decode.paths.general import GeneralCache, GeneralPath
from teal_cli.models.architectures import kind_for
from teal_cli.models.forward import check_context
from teal_cli.sparse import SparsityControl


class Seq2SeqPath(GeneralPath):
    """The prompt is the encoder's: it and the start token run dense, every step after them sparse."""

    name = "encoder-decoder"

    def __init__(self, model: Any, control: SparsityControl | None) -> None:
        super().__init__(model, control)
        forced = getattr(model.generation_config, "forced_bos_token_id", None)
        self._forced: int | None = forced if isinstance(forced, int) else None

    def _state_names(self) -> None:
        """Of every encoder-decoder it is `past_key_values`, beside the encoder's states."""

    @classmethod
    def unsupported(cls, model: Any, control: SparsityControl | None) -> str | None:
        """As `Path.unsupported`."""
        return None if kind_for(model) == "seq2seq" else f"model type {model.config.model_type} has no encoder"

    def check_length(self, prompt_tokens: int, new_tokens: int) -> None:
        """Fail where encoder or decoder have too few positions; each has as many. Relative ones (T5) have no end.

        Raises:
            ArtefactError: more positions than the model has.
        """
        check_context(self.max_length, prompt_tokens, new_tokens, starts=1 if self._forced is None else 2)

    def _new_state(self, length: int) -> EncoderDecoderCache:
        """It grows."""
        return EncoderDecoderCache(*(DynamicCache(config=self.model.config) for _ in range(2)))

    def prefill(self, input_ids: Tensor, cache: GeneralCache, lengths: list[int] | None) -> Tensor:
        """As `Path.prefill`: encode the prompts; the logits are those after the decoder's start token."""
        if lengths is not None:
            raise refuse_lengths("an encoder would read the padding")
        cache.encoded = self.model.get_encoder()(input_ids=input_ids)
        return super().prefill(self._start(input_ids), cache, None)

    def _start(self, input_ids: Tensor) -> Tensor:
        """(rows, 1 or 2) int64: what the decoder reads first, dense; BART is told the first token too."""
        forced = self._forced
        start = torch.full_like(input_ids[:, :1], self.model.config.decoder_start_token_id or 0)
        return start if forced is None else torch.cat([start, torch.full_like(start, forced)], dim=1)

    def _forward(self, input_ids: Tensor, cache: GeneralCache, keep: int | Tensor) -> Tensor:
        logits: Tensor = self.model(
            encoder_outputs=cache.encoded, decoder_input_ids=input_ids, past_key_values=cache.state, use_cache=True
        ).logits
        return logits

    def can_capture(self, cache: GeneralCache) -> bool:
        """As of `GeneralPath`: its cache grows."""
        return False

    def without_cache(self, prompt: Tensor, tokens: Tensor) -> Tensor:
        """As of `Path`. Sparse, the cache holds what the encoder and the start token gave, which stay dense."""
        control = self.control
        if control is not None and control.decodes_sparse:
            cache = self.new_cache(tokens.shape[1])
            with control.dense():
                self.prefill(prompt, cache, None)
            with control.masked(0):
                return self._forward(tokens, cache, tokens.shape[1])
        ids = torch.cat([self._start(prompt), tokens], dim=1)
        with control.dense() if control else nullcontext():
            encoded = self.model.get_encoder()(input_ids=prompt)
        output = self.model(encoder_outputs=encoded, decoder_input_ids=ids, use_cache=False)
        return output.logits[:, -tokens.shape[1] :]  # type: ignore[no-any-return]
