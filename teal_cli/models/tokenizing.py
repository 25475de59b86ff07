"""A model's tokenizer: loaded, and used, with its faults told in one line.

Tokenizers come with a model, so what is wrong inside them is an error of the model. transformers and tokenizers
raise any class of exception for it; every call into them goes through `load_tokenizer`, `encode` and `decode`.
"""

import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from teal_cli.errors import ArtefactError, blame, shown
from teal_cli.reading import MOST_JSON_BYTES, is_ordinary, read_json

_PREFIXES = (
    *("tokenizer", "vocab", "merges", "added_tokens", "special_tokens_map", "chat_template"),
    *("spiece", "sentencepiece", "bpe", "normalizer"),
)
"""How the names of the files begin that transformers' tokenizers read from a folder."""
_TEMPLATES = "additional_chat_templates"
_MOST_TEMPLATE_BYTES = 1 << 20
"""Published chat templates have up to 40 KB."""
_MOST_GROWTH = 256
"""Published tokenizers write a space or a quote as up to four characters."""
_MOST_RULES = 1_000


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer. It knows how many tokens the folder's model has, for `encode` to check.

    Raises:
        ArtefactError: there is none that transformers can read, or a file of it is no ordinary file or too large.
    """
    from transformers import AutoTokenizer

    import teal_cli.models.trained_sparse  # noqa: F401  (a tokenizer may be found by the model's type)

    with blame(f"{folder} has no usable tokenizer"):
        _check_files(folder)
        _check_growth(folder)
        with _panics_unsaid():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokenizer.teal_vocabulary = _vocabulary(folder)
    return tokenizer


def encode(tokenizer: Any, text: str, **options: Any) -> list[int]:
    """The token ids of a text.

    Args:
        tokenizer: a transformers tokenizer; one of `load_tokenizer` is checked against its model.
        text: of any length.
        options: of the tokenizer, such as `add_special_tokens`.

    Raises:
        ArtefactError: the tokenizer fails, or gives a token that its model does not have.
    """
    with blame("the model's tokenizer cannot encode a text"), _panics_unsaid():
        # verbose=False: texts are longer than the model's context on purpose; they are cut later.
        ids = [int(token) for token in tokenizer(text, verbose=False, **options)["input_ids"]]
    check_ids(tokenizer, ids)
    return ids


def decode(tokenizer: Any, ids: Sequence[int], **options: Any) -> str:
    """The text of token ids.

    Args:
        tokenizer: a transformers tokenizer.
        ids: tokens of its model.
        options: of the tokenizer, such as `skip_special_tokens`.

    Raises:
        ArtefactError: the tokenizer fails.
    """
    with blame("the model's tokenizer cannot decode tokens"), _panics_unsaid():
        return str(tokenizer.decode(list(ids), **options))


def check_ids(tokenizer: Any, ids: Sequence[int]) -> None:
    """Refuse tokens that the model has no embedding for.

    Args:
        tokenizer: of `load_tokenizer`; of another, nothing is known and everything passes.
        ids: what the model is to read.

    Raises:
        ArtefactError: see above; it names the token and both sizes.
    """
    vocabulary = getattr(tokenizer, "teal_vocabulary", None)
    strange = max(ids, default=0)
    if vocabulary is None or strange < vocabulary:
        return
    with blame("the model's tokenizer does not know its own tokens"):
        token, size = tokenizer.convert_ids_to_tokens(strange), len(tokenizer)
    raise ArtefactError(
        f"token {shown(token)} (id {strange}) is not one of the model's: the tokenizer has {size:,} tokens and the "
        f"model's embedding {vocabulary:,}; use the tokenizer that belongs to these weights, or resize the embedding"
    )


def _vocabulary(folder: Path) -> int:
    """Tokens that the folder's model has an embedding for."""
    from transformers import AutoConfig

    size = read_json(folder / "config.json", "model configuration").get("vocab_size")
    if not isinstance(size, int):  # of a part of the model, or left to the default of the model's type
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        size = config.get_text_config(decoder=True).vocab_size
    return int(size)


@contextmanager
def _panics_unsaid() -> Iterator[None]:
    """Rust says of a panic what it has to say to stderr, before anybody can catch it; the error line says it again."""
    with _STDERR_LOCK:
        silenced = _STDERR.enter()
    try:
        yield
    finally:
        if silenced:
            with _STDERR_LOCK:
                _STDERR.leave()


class _Stderr:
    """Where it leads, while several threads want it quiet: the first one turns it away, the last one back."""

    def __init__(self) -> None:
        self._inside, self._kept = 0, -1

    def enter(self) -> bool:
        """Turn it away; False where it is closed."""
        if self._inside == 0:
            try:
                kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
            except OSError:
                return False
            os.dup2(nowhere, 2)
            os.close(nowhere)
            self._kept = kept
        self._inside += 1
        return True

    def leave(self) -> None:
        """Turn it back, after as many calls as it was turned away."""
        self._inside -= 1
        if self._inside == 0:
            os.dup2(self._kept, 2)
            os.close(self._kept)


_STDERR, _STDERR_LOCK = _Stderr(), threading.Lock()


def _check_growth(folder: Path) -> None:
    """Refuse replacement rules that multiply a text: twenty that write a letter twice make a million of it.

    Raises:
        ArtefactError: they may make it more than `_MOST_GROWTH` times as long.
    """
    if not (folder / "tokenizer.json").is_file():
        return
    content = read_json(folder / "tokenizer.json", "tokenizer")
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        if _growth(content.get(part)) > _MOST_GROWTH:
            raise ArtefactError(f"the {part} rules of {folder / 'tokenizer.json'} make texts of any length: not used")


def _growth(rules: Any) -> float:
    """How many times as long its replacements, one after another, may make a text."""
    if isinstance(rules, list):
        return math.prod(map(_growth, rules[:_MOST_RULES])) if len(rules) <= _MOST_RULES else math.inf
    if not isinstance(rules, dict):
        return 1.0
    inside = math.prod(_growth(value) for value in rules.values() if isinstance(value, dict | list))
    content, pattern = rules.get("content"), rules.get("pattern")
    if not isinstance(content, str) or pattern is None:
        return inside
    plain = pattern.get("String") if isinstance(pattern, dict) else None
    return inside * max(1.0, len(content) / max(1, len(plain) if isinstance(plain, str) else 1))


def _check_files(folder: Path) -> None:
    """Refuse pipes, devices and giant files, which transformers would begin to read.

    Raises:
        ArtefactError: see above.
    """
    files = [path for path in folder.iterdir() if path.name.startswith(_PREFIXES)]
    if (folder / _TEMPLATES).is_dir():
        files += (folder / _TEMPLATES).glob("*.jinja")
    for path in sorted(files):
        if path.is_dir():
            continue
        status = path.stat()
        most = _MOST_TEMPLATE_BYTES if path.suffix == ".jinja" else MOST_JSON_BYTES
        if not is_ordinary(status):
            raise ArtefactError(f"{path} is not an ordinary file: a tokenizer is not read from pipes or devices")
        if status.st_size > most:
            raise ArtefactError(f"{path} has {status.st_size:,} bytes; tokenizers of more than {most:,} are not read")
