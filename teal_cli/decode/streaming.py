"""Text that streams as tokens arrive: what is shown is never taken back, and in the end it is all of it."""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from teal_cli.models.tokenizing import decode

_WINDOW = 16
"""Tokens that are decoded again for each new one, at most, while the text goes on without a break."""
_CONTEXT = 4
"""Of them, those that stay when the window moves: the first token of a text may be decoded in another way."""
_PART = "\ufffd"
"""What a tokenizer writes for bytes that are not a whole character, yet."""

# Beginnings of what `clean_up_tokenization` replaces: " .", " ' ", " n't", " 'm", " 's", " 've", " 're" and so on.
# A space after " n" counts too, since " ' " becomes "'" before "n't" is looked for. And a "'" that was " ' " is " '"
# again when a full stop follows, which takes the space first.
_MAY_BE_CLEANED = re.compile(r"(?: +(?:n ?'?|'[vr]?)?|')$")

# Decoders of the tokenizers library by which a token changes nothing but the end of the text before it.
_LOCAL = {"ByteLevel", "ByteFallback", "Fuse", "Strip", "Metaspace", "WordPiece", "BPEDecoder"}
_LOCAL_CLASSES = {"ByT5Tokenizer", "CodeGenTokenizer"}
"""Classes with a decoding of their own that is as local."""


class TextStream:
    """Decodes tokens one by one; the pieces put together are the tokenizer's own decoding of them all.

    A piece is written as soon as no later token can change it. What waits: the bytes of a character that is not
    whole, a run of byte tokens (one wrong byte changes how all of them are written), and with
    `clean_up_tokenization_spaces` a space that may be removed. A tokenizer whose decoding is not known to be local
    (CTRL, BioGPT) writes everything at the end.

    Args:
        tokenizer: of transformers.
        write: handed the pieces, none of them empty.
        skip_special_tokens: as of the tokenizer's `decode`.
        before: tokens whose text stands before that of the stream, and is not written.
    """

    def __init__(
        self,
        tokenizer: Any,
        write: Callable[[str], object],
        *,
        skip_special_tokens: bool = True,
        before: Sequence[int] = (),
    ) -> None:
        self._tokenizer, self._write, self._skip = tokenizer, write, skip_special_tokens
        self._cleans = _cleans_up(tokenizer)
        self._streams = _is_local(tokenizer)
        self._bytes = _byte_tokens(tokenizer) if self._streams else frozenset()
        added = getattr(tokenizer, "added_tokens_decoder", {}) if skip_special_tokens else {}
        self._skipped = frozenset(token for token, content in added.items() if content.special)
        self._ids = list(before)
        self._window = [token for token in before if token not in self._skipped]
        whole = len(self._window)
        while whole and self._window[whole - 1] in self._bytes:  # a run that may go on
            whole -= 1
        text = self._decode(self._window[:whole])
        self._shown = text[: self._settled(text)]
        """The text of the window, as far as it was written."""
        self._pieces = [self._shown]
        self._look_at = 0
        self.before = self._shown
        """The text of the tokens before, as far as no later token changes it."""

    def put(self, tokens: torch.Tensor | Iterable[int]) -> None:
        """Take tokens: a tensor of int64, or numbers."""
        for token in tokens.flatten().tolist() if isinstance(tokens, torch.Tensor) else tokens:
            self._ids.append(token)
            if not self._streams or token in self._skipped:
                continue
            self._window.append(token)
            if token not in self._bytes and len(self._window) >= self._look_at:
                self._look()

    def end(self) -> str:
        """Write what is left; the whole text after `before`, as the tokenizer decodes it."""
        text, shown = self._decode(self._ids), "".join(self._pieces)
        self._streams = False
        self._emit(text[len(shown) :])
        return text[len(self.before) :]

    def _decode(self, ids: list[int]) -> str:
        return decode(self._tokenizer, ids, skip_special_tokens=self._skip) if ids else ""

    def _emit(self, piece: str) -> None:
        if piece:
            self._pieces.append(piece)
            self._write(piece)

    def _look(self) -> None:
        """Decode the window, and write what is settled."""
        text = self._decode(self._window)
        if not text.startswith(self._shown):  # not as local as it should be: what is written stays, the rest waits
            self._streams = False
            return
        settled = max(self._settled(text), len(self._shown))  # what is shown may look open again: "' n"
        piece, self._shown = text[len(self._shown) : settled], text[:settled]
        if len(self._window) >= _WINDOW:
            # While nothing settles, fewer looks: the work stays proportional to the tokens.
            self._look_at = len(self._window) + len(self._window) // _WINDOW + 1
            context = self._window[-_CONTEXT:]
            kept = self._decode(context)
            if settled == len(text) and kept:
                self._window, self._shown, self._look_at = context, kept, 0
        self._emit(piece)

    def _settled(self, text: str) -> int:
        """How many characters no later token can change, unless byte tokens stand at the end."""
        text = text.removesuffix(_PART)  # only the last: a byte that is wrong before another stays wrong
        found = _MAY_BE_CLEANED.search(text) if self._cleans else None
        return len(text) if found is None else found.start()


def text_streamer(tokenizer: Any, write: Callable[[str], object]) -> TextStream:
    """A `TextStream` of a reply: without special tokens."""
    return TextStream(tokenizer, write)


def _cleans_up(tokenizer: Any) -> bool:
    """Whether decoding removes spaces before punctuation. transformers does not for BPE, whatever the setting."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    is_bpe = backend is not None and type(backend.model).__name__ == "BPE"
    forced = getattr(tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    return bool(getattr(tokenizer, "clean_up_tokenization_spaces", False)) and (not is_bpe or forced)


def _decoders(tokenizer: Any) -> list[dict[str, Any]]:
    """The tokenizers library's decoders, one after the other; none join the tokens with spaces."""
    decoder = tokenizer.backend_tokenizer.decoder
    if decoder is None:
        return []
    content = json.loads(decoder.__getstate__())
    return list(content["decoders"]) if content["type"] == "Sequence" else [content]


def _is_local(tokenizer: Any) -> bool:
    """Whether a token changes nothing but the end of the text before it."""
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    kind = type(tokenizer)
    if kind.__name__ in _LOCAL_CLASSES:
        return True
    base = next((base for base in (PreTrainedTokenizerFast, SentencePieceBackend) if issubclass(kind, base)), None)
    if base is None or any(
        getattr(kind, name) is not getattr(parent, name)
        for parent, names in (
            (PreTrainedTokenizerBase, ("decode", "clean_up_tokenization")),
            (base, ("_decode", "convert_tokens_to_string")),
        )
        for name in names
    ):
        return False
    return base is SentencePieceBackend or all(
        decoder["type"] in _LOCAL
        # One character for another text; a longer pattern may lie across two tokens.
        or (decoder["type"] == "Replace" and len(decoder["pattern"].get("String", "")) == 1)
        for decoder in _decoders(tokenizer)
    )


def _byte_tokens(tokenizer: Any) -> frozenset[int]:
    """Tokens that stand for a byte, such as <0xE3>, where the decoder puts runs of them together."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or all(decoder["type"] != "ByteFallback" for decoder in _decoders(tokenizer)):
        return frozenset()
    found = (backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(token for token in found if token is not None)
