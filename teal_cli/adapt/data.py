"""The text of a run: several datasets in shares, in an order that is fixed by the seed, and a slice held out of it.

Only the half of a corpus that calibration reads is trained on, so that `teal eval` never sees a trained text. Of this
half every sixteenth document (or passage) is the third slice: not trained on, and read to see when to stop.
"""

import hashlib
import random
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from teal_cli.data import Some, cut_documents, half_of, load_documents, token_blocks
from teal_cli.errors import ArtefactError

_HELD_OUT = 16
"""One document of so many."""
_SAMPLED, _SAMPLED_ON_A_GPU = 16, 128
"""Sequences of dataset self that are written together: a run takes millions of tokens."""


def _slices(documents: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """What is trained on, and what is held out: by a digest of each text where there are many, else by turns."""
    if len(documents) < 2:
        raise ArtefactError("the text of a run needs several documents or passages: use more text")
    if len(documents) < 4 * _HELD_OUT:
        step = min(_HELD_OUT, len(documents))
        held = set(range(step - 1, len(documents), step))
    else:
        digests = (hashlib.sha256(b"third slice" + text.encode()).digest()[0] for text in documents)
        held = {index for index, digest in enumerate(digests) if digest % _HELD_OUT == 0}
    train = array("q", (index for index in range(len(documents)) if index not in held))
    return Some(documents, train), Some(documents, array("q", sorted(held)))


class Pool:
    """The sequences of one dataset.

    Args:
        dataset: as for `teal calibrate`.
        tokenizer: a transformers tokenizer.
        seq_len: tokens a sequence.
        wanted: sequences that the run takes.
        validation: sequences to hold out.
        seed: of the order, or of the sampling.
        model: the dense model, for dataset self.

    Raises:
        ArtefactError: the text is shorter than one sequence.
    """

    def __init__(
        self, dataset: str, tokenizer: Any, *, seq_len: int, wanted: int, validation: int, seed: int, model: Any
    ) -> None:
        self.seed = seed
        if dataset == "self":
            both = token_blocks(
                dataset,
                tokenizer,
                tokens=(wanted + validation) * seq_len,
                seq_len=seq_len,
                seed=seed,
                half="calibration",
                model=model,
                together=_SAMPLED_ON_A_GPU if model.device.type == "cuda" else _SAMPLED,
            )
            self.held_out, self.sequences = both[:validation], both[validation:]
            return
        train, held_out = _slices(half_of(load_documents(dataset), "calibration"))
        what = f"a slice of the text of {dataset}"
        self.sequences = cut_documents(train, tokenizer, wanted, seq_len, seed, what=what)
        self.held_out = cut_documents(held_out, tokenizer, validation, seq_len, seed, what=what)

    def order(self) -> Iterator[int]:
        """Numbers of sequences without end: each of them once, shuffled, then all of them again."""
        epoch = 0
        while True:
            order = list(range(len(self.sequences)))
            random.Random(f"{self.seed} {epoch}").shuffle(order)
            yield from order
            epoch += 1


class Text(Dataset[dict[str, Tensor]]):
    """The sequences of a run in their order, each with the length of its dense prefix.

    Args:
        pools: dataset -> sequences.
        weights: dataset -> its share of the sequences, relative to the others'.
        count: sequences of the run.
        most_prefix: dense prefixes are drawn evenly from 0 to this.
        seed: of the draws.
    """

    def __init__(
        self, pools: Mapping[str, Pool], weights: Mapping[str, float], *, count: int, most_prefix: int, seed: int
    ) -> None:
        draw = random.Random(f"{seed} order")
        orders = {name: pool.order() for name, pool in pools.items()}
        names = list(pools)
        drawn = draw.choices(names, [weights[name] for name in names], k=count)
        self._rows = [(name, next(orders[name])) for name in drawn]
        self._prefixes = [draw.randint(0, most_prefix) for _ in range(count)]
        self._pools = pools

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        name, row = self._rows[index]
        return {
            "input_ids": self._pools[name].sequences[row],
            "dense_prefix": torch.tensor(self._prefixes[index], dtype=torch.int64),
        }

    def first(self, count: int) -> Tensor:
        """(at most count, seq_len) int64: the first sequences, to measure on."""
        return torch.stack([self[index]["input_ids"] for index in range(min(count, len(self)))])

    def repeats(self) -> float:
        """How often the most read text is read."""
        read = {name: sum(1 for row in self._rows if row[0] == name) for name in self._pools}
        return max(read[name] / len(pool.sequences) for name, pool in self._pools.items())


class HeldOut(Dataset[dict[str, Tensor]]):
    """The third slice, with a dense prefix of half a sequence as in `teal eval`.

    Args:
        sequences: (sequences, tokens) int64.
        prefix: positions that run dense.
    """

    def __init__(self, sequences: Tensor, prefix: int) -> None:
        self.sequences, self.prefix = sequences, prefix

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.sequences[index], "dense_prefix": torch.tensor(self.prefix, dtype=torch.int64)}


def pools_of(
    weights: Mapping[str, float],
    tokenizer: Any,
    *,
    seq_len: int,
    count: int,
    validation: int,
    seed: int,
    model: Any = None,
) -> dict[str, Pool]:
    """A pool for each dataset, with as many sequences as its share of the run, and as its share held out.

    Raises:
        ArtefactError: a text that is too short, or cannot be read.
    """
    total = sum(weights.values())
    return {
        name: Pool(
            name,
            tokenizer,
            seq_len=seq_len,
            wanted=max(1, round(1.2 * count * weight / total)),
            validation=max(1, round(validation * weight / total)),
            seed=seed,
            model=model,
        )
        for name, weight in weights.items()
    }
