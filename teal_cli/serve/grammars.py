"""Replies that follow a JSON schema: llguidance says before each token which ones may come."""

import json
import threading
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from teal_cli.decode.requests import Mask
from teal_cli.errors import ArtefactError
from teal_cli.serve.errors import ApiError

_LONGEST_REASON = 300


class Grammars:
    """Makes masks for schemas. That takes a while; any thread may.

    Args:
        tokenizer: of the model.
        vocabulary: of its logits.
        stop: tokens that end a reply, which are allowed where the text is whole.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, stop: frozenset[int]) -> None:
        self._made: Any = None
        self._lock = threading.Lock()
        self._tokenizer, self._vocabulary, self._stop = tokenizer, vocabulary, sorted(stop)

    @property
    def unavailable_because(self) -> str | None:
        """Why no grammar can be followed; None where one can."""
        from transformers import PreTrainedTokenizerFast

        if find_spec("llguidance") is None:
            return "the package llguidance is not installed (the extra serve has it)"
        if not isinstance(self._tokenizer, PreTrainedTokenizerFast):
            return "this model's tokenizer is not one of the tokenizers library"
        return None if self._stop else "this model has no token that ends a reply"

    def mask(self, schema: Mapping[str, Any], param: str) -> Mask:
        """What keeps one reply to a schema.

        Args:
            schema: of JSON.
            param: the field of the request that asks for it.

        Raises:
            ApiError: a schema that cannot be followed, or no library for it.
        """
        if (because := self.unavailable_because) is not None:
            raise ApiError(400, f"{param} is not served here: {because}", param=param)
        from llguidance import LLMatcher

        # White space between tokens of JSON would let a model that likes it go on without end.
        options: Any = {"whitespace_flexible": False}
        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)
            matcher = LLMatcher(self._vocabulary_of_grammars(), grammar, log_level=0)
        except (ValueError, RecursionError) as error:
            raise _refused(str(error), param) from error
        if matcher.is_error():
            raise _refused(matcher.get_error(), param)
        mask = _Mask(matcher)
        if not mask.allows_something():
            raise _refused("no text follows it", param)
        return mask

    def _vocabulary_of_grammars(self) -> Any:
        """The vocabulary as the library has it: made once, since that takes a while."""
        with self._lock:
            if self._made is None:
                from llguidance.hf import from_tokenizer

                self._made = from_tokenizer(self._tokenizer, n_vocab=self._vocabulary, eos_token=self._stop)
            return self._made


def _refused(reason: str, param: str) -> ApiError:
    line = " ".join(reason.split("<state>")[0].split())[:_LONGEST_REASON]
    return ApiError(400, f"the schema cannot be followed: {line}", param=param, code="invalid_schema")


class _Mask:
    """The state of one reply."""

    def __init__(self, matcher: Any) -> None:
        self._matcher, self._taken = matcher, 0

    def __call__(self, logits: Tensor, tokens: list[int]) -> None:
        new, self._taken = tokens[self._taken :], len(tokens)
        if new:
            self._matcher.consume_tokens(new)
        allowed = self._allowed()
        if self._matcher.is_error():
            raise ArtefactError(f"the reply left its grammar: {self._matcher.get_error()[:_LONGEST_REASON]}")
        logits[: len(allowed)].masked_fill_(~allowed.to(logits.device), -torch.inf)
        logits[len(allowed) :] = -torch.inf

    def allows_something(self) -> bool:
        return bool(self._allowed().any()) and not self._matcher.is_error()

    def _allowed(self) -> Tensor:
        """(vocabulary,) bool."""
        return torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8) != 0
