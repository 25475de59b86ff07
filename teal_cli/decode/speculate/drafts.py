"""Where tokens are drafted: by the model at other weights or sparsity, or from the text so far."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from teal_cli.decode.paths.base import Stepper
from teal_cli.decode.sampling import Sampler
from teal_cli.decode.speculate.lookup import NGrams
from teal_cli.decode.speculate.pace import Offer
from teal_cli.speculation import MOST_DRAFTED


@dataclass(frozen=True)
class Drafted:
    """Tokens to be verified."""

    tokens: Tensor
    """(rows, count) int64."""
    probabilities: Tensor | None = None
    """(rows, count, vocabulary) from which they were drawn; None where each was certain."""


class Draft(ABC):
    """One source of drafts, of the sequences of one cache."""

    @abstractmethod
    def offer(self) -> Offer:
        """What it could do now."""

    @abstractmethod
    def draft(self, token: Tensor, lengths: list[int], count: int) -> Drafted:
        """Draft so many tokens of each sequence.

        Args:
            token: (rows,) int64, the last of each, which is in no cache yet.
            lengths: positions of each that are in the cache.
            count: at most as many as were offered.
        """

    @abstractmethod
    def see(self, row: int, tokens: Sequence[int]) -> None:
        """Learn by which tokens a sequence went on."""


class ModelDraft(Draft):
    """Decodes on the cache of the model that verifies, which overwrites what it writes.

    Args:
        stepper: of the model that drafts.
        sampler: of the text: it draws drafts as it draws tokens.
    """

    def __init__(self, stepper: Stepper, sampler: Sampler) -> None:
        self._stepper, self._sampler = stepper, sampler

    def see(self, row: int, tokens: Sequence[int]) -> None:
        """As `Draft.see`: the cache has them."""

    def offer(self) -> Offer:
        """As `Draft.offer`: always."""
        return Offer("model", "model", MOST_DRAFTED)

    def draft(self, token: Tensor, lengths: list[int], count: int) -> Drafted:
        """As `Draft.draft`."""
        tokens: list[Tensor] = []
        drawn_from: list[Tensor] = []
        last = token[:, None]
        for index in range(count):
            logits, best = self._stepper.run(last, [length + index for length in lengths])
            if self._sampler.greedy:
                last = best.clone()
            else:
                drawn_from.append(self._sampler.probabilities(logits[:, -1]))
                last = self._sampler.draw(drawn_from[-1])
            tokens.append(last)
        return Drafted(torch.cat(tokens, dim=1), torch.stack(drawn_from, dim=1) if drawn_from else None)


class LookupDraft(Draft):
    """Takes what followed the last tokens where they stood before.

    Args:
        rows: sequences.
        device: of their tokens.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self._texts = [NGrams() for _ in range(rows)]
        self._device = device

    def see(self, row: int, tokens: Sequence[int]) -> None:
        """As `Draft.see`."""
        self._texts[row].extend(tokens)

    def offer(self) -> Offer:
        """As `Draft.offer`."""
        return lookup_offer(self._texts)

    def draft(self, token: Tensor, lengths: list[int], count: int) -> Drafted:
        """As `Draft.draft`. A sequence that does not repeat itself gets its last token again."""
        found = [text.following(count)[0] for text in self._texts]
        tokens = [own or [last] * count for own, last in zip(found, token.tolist(), strict=True)]
        return Drafted(torch.tensor(tokens, dtype=torch.int64, device=self._device))


def lookup_offer(texts: Sequence[NGrams]) -> Offer:
    """What looking up could do now: something where some text repeats itself."""
    alike = [text.following(1)[1] for text in texts]
    found = [size for size in alike if size]
    if not found:
        return Offer("lookup", "lookup", 0, is_free=True)
    return Offer("lookup", f"lookup of {min(found)}", MOST_DRAFTED, len(found) / len(alike), is_free=True)
