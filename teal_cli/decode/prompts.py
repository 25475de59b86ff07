"""Prompts in pieces, and what of a prompt a cache has already.

A prompt is run in pieces that begin at multiples of a length of the path's, whoever runs it. A piece is then the same
pass wherever it stands in a conversation, over the same keys and values, and gives the same bits. So whole pieces can
be kept for a prompt that begins alike, and its reply stays what it is. A piece of other bounds would give other
roundings, and where one input lies beside its threshold, another text.

Keys and values of decoded tokens are others than a prompt's pass gives: by much where inputs were skipped, by rounding
where none were. They are not kept, unless that is asked for (`Keep`).
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import Any, Literal

import torch
from torch import Tensor

from teal_cli.decode.paths.base import Path

Keep = Literal["prompts", "replies", "nothing"]
"""What is kept for prompts that begin alike: whole pieces of prompts, so that texts stay what they are; replies too, as
they were decoded, for the quickest first token; or nothing."""


def pieces(done: int, total: int, piece: int | None) -> Iterator[tuple[int, int]]:
    """Where the pieces of a prompt begin and end, of which so many tokens are done."""
    while done < total:
        end = total if piece is None else min(total, (done // piece + 1) * piece)
        yield done, end
        done = end


def reusable(prompt: Sequence[int], known: Sequence[int], dense: int, piece: int | None, keep: Keep) -> int:
    """How many of a prompt's first tokens need not be run again. The last one always is, for its logits.

    Args:
        prompt: all of its tokens.
        known: whose keys and values there are.
        dense: how many of them were run as a prompt, the first ones; the others were decoded.
        piece: of the path; None where prompts have no pieces.
        keep: what may be used.
    """
    if piece is None or keep == "nothing":
        return 0
    alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, known, strict=False)))
    most = min(alike, len(prompt) - 1)
    return most if keep == "replies" else min(most, dense) // piece * piece


Prefill = Callable[[Tensor, Any], Tensor]
"""(1, tokens) int64 and a cache to (1, vocabulary) logits, densely."""


class KeptCache:
    """A cache that stays between replies, for the next prompt to go on from: a conversation is not run again.

    Args:
        path: whose caches they are.
        keep: what of them is used.
    """

    def __init__(self, path: Path, keep: Keep) -> None:
        self.path, self.keep = path, keep
        self._cache: Any = None
        self._tokens: list[int] = []
        self._dense = 0

    def run(self, prefill: Prefill, input_ids: Tensor, length: int) -> tuple[Any, Tensor]:
        """Run what of a prompt is new.

        Args:
            prefill: runs tokens behind what a cache holds.
            input_ids: (1, tokens) int64, the whole prompt.
            length: positions that are needed, the reply's among them.

        Returns:
            The cache, and the logits of the prompt's last token.
        """
        prompt: list[int] = input_ids[0].tolist()
        piece = self.path.piece_for(length)
        cache, self._cache = self._cache, None  # an interrupted pass leaves nothing to go on from
        done = 0
        if cache is not None:
            done = reusable(prompt, self._tokens, self._dense, piece, self.keep)
            done = min(done, cache.length)
        if done == 0:
            cache = None  # its memory, before that of the next
            cache = self.path.new_cache(length)
        else:
            cache.truncate(done)
            if cache.positions < length:
                # As much again, so that the turns of a conversation do not copy it each time.
                cache = cache.grown(min(max(length, 2 * cache.positions), max(length, self.path.max_length)))
        logits = torch.empty(0)
        for start, end in pieces(done, len(prompt), piece):
            logits = prefill(input_ids[:, start:end], cache)
        self._cache, self._tokens, self._dense = cache, prompt, len(prompt)
        return cache, logits

    def add(self, token: int) -> None:
        """A token was decoded, and is in the cache once the next one was."""
        self._tokens.append(token)

    def forget(self) -> None:
        """Give the memory back."""
        self._cache, self._tokens = None, []
