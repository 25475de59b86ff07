"""Speculative decoding of one model: its drafts, and replies whose tokens are the dense model's."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from teal_cli.decode.cache import FixedCache
from teal_cli.decode.engine import Engine
from teal_cli.decode.paths.base import Path, Stepper
from teal_cli.decode.prompts import pieces
from teal_cli.decode.sampling import Sampler, SamplingConfig
from teal_cli.decode.speculate.drafts import Draft, LookupDraft, ModelDraft
from teal_cli.decode.speculate.loop import SpeculativeLoop, Tally
from teal_cli.decode.speculate.pace import Pace
from teal_cli.errors import UsageError
from teal_cli.sparse import SparsityControl, control_of
from teal_cli.speculation import MOST_DRAFTED


class Speculator:
    """Decodes what a model would decode densely, from drafts.

    Args:
        engine: of the model that verifies. Its sparse layers skip nothing but in drafts.
        draft: the model that drafts, the engine's own or one of the same keys and values; None for none.
        sparse: whether that one skips inputs by the rules of its layers.
        lookup: whether tokens are also drafted from the text so far.
        count: tokens that are drafted for a pass; None for as many as pay, 0 among them.

    Raises:
        UsageError: a model that cannot take tokens back, a copy that its path cannot decode, or more tokens than a pass
            takes.
    """

    def __init__(
        self, engine: Engine, draft: Any = None, *, sparse: bool = False, lookup: bool = False, count: int | None = None
    ) -> None:
        if count is not None and not 1 <= count <= MOST_DRAFTED:
            raise UsageError(f"{count} drafted tokens are not between 1 and {MOST_DRAFTED} (flag --draft-tokens)")
        self.engine, self.sparse, self.lookup = engine, sparse, lookup
        self.tally = Tally()
        """Of the last reply, or of the loops since it was set."""
        self.draft = draft
        self._draft_path: Path | None = None
        self.count = count
        self._pace: dict[int, Pace] = {}
        """Of greedy text, by number of sequences; it goes on from reply to reply."""
        self._steppers: tuple[Any, Any, Stepper, Stepper | None] | None = None
        self.check()

    def check(self) -> None:
        """Refuse what the engine's path, which may be another by now, cannot decode.

        Raises:
            UsageError: as for the speculator itself.
        """
        reason = self.engine.path.cannot_step_back_because()
        if reason is not None:
            raise UsageError(f"this model cannot be decoded speculatively (flag --speculate): {reason}")
        if self.draft is not None:
            _ = self.draft_path  # or it says why not

    def generate(
        self, input_ids: Tensor, *, max_new_tokens: int, sampling: SamplingConfig, stop: frozenset[int] = frozenset()
    ) -> Iterator[int]:
        """As `Engine.generate`: greedy tokens are those of the dense model, drawn ones are distributed as its own."""
        engine = self.engine
        engine.check_prompt(input_ids, max_new_tokens)
        self.tally = Tally()
        length, sampler = input_ids.shape[1] + max_new_tokens, Sampler(sampling, engine.device)
        kept, cache, logits = None, None, torch.empty(0)
        if engine.path.piece_for(length) is not None:
            kept, (cache, logits) = engine.run_prompt(input_ids.to(engine.device), length, None)
        else:
            cache, logits = self.run_prompt(input_ids, length)
        engine.check_numbers(logits)
        token = sampler.next_token(logits)
        loop = self.loop(cache, input_ids, token, sampler, positions=length)
        left, new = max_new_tokens, token[0].tolist()
        while left > 0:
            for value in new[:left]:
                if kept is not None:
                    kept.add(value)
                if value in stop:
                    return
                yield value
            left -= len(new)
            if left > 0:
                try:
                    (new,) = loop.advance()
                finally:
                    if kept is not None:
                        cache.truncate(loop.lengths[0])  # no prompt goes on from drafts that were refused

    def run_prompt(self, input_ids: Tensor, length: int) -> tuple[Any, Tensor]:
        """A cache for so many positions with prompts of one length in it, and their (rows, vocabulary) logits.

        The one of the last prompt is taken again where it will do, with the graphs that were captured on it.
        """
        engine, rows = self.engine, input_ids.shape[0]
        cache, logits = None if self._steppers is None else self._steppers[0], torch.empty(0)
        if isinstance(cache, FixedCache) and cache.positions >= length and len(cache.row_lengths()) == rows:
            cache.reset()
        else:
            cache = engine.path.new_cache_for_steppers(length)
        for start, end in pieces(0, input_ids.shape[1], engine.path.piece_for(length)):
            logits = engine.prefill(input_ids[:, start:end].to(engine.device), cache)
        return cache, logits

    def loop(
        self, cache: Any, input_ids: Tensor, token: Tensor, sampler: Sampler, *, positions: int, lengths: Any = None
    ) -> SpeculativeLoop:
        """Rounds after a prompt.

        Args:
            cache: prefilled.
            input_ids: (rows, tokens) int64, the prompts.
            token: (rows, 1) int64, the first token behind each.
            sampler: chooses the tokens.
            positions: that sequences may take.
            lengths: of the prompts, where they differ.
        """
        rows, tokens = input_ids.shape
        lengths = [tokens] * rows if lengths is None else list(lengths)
        target, drafting = self.steppers_on(cache)
        drafts: list[Draft] = []
        if self.lookup:
            found = LookupDraft(rows, self.engine.device)
            for row, length in enumerate(lengths):
                found.see(row, input_ids[row, :length].tolist() + token[row].tolist())
            drafts.append(found)
        if drafting is not None:
            drafts.append(ModelDraft(drafting, sampler))
        return SpeculativeLoop(
            target,
            drafts,
            self.pace(rows, target, sampler.greedy),
            positions=positions,
            lengths=lengths,
            token=token,
            sampler=sampler,
            tally=self.tally,
        )

    def pace(self, rows: int, target: Stepper, greedy: bool = True) -> Pace:
        """For so many sequences: a pass over tokens of all is as long as the passes that are no shorter.

        Where tokens are drawn, their random numbers depend on how many were drafted: nothing but the reply itself may
        choose that, or a seed would not give the same text again.
        """
        counts = [span - 1 for span in target.spans if 1 < span <= MOST_DRAFTED + 1]
        if not greedy:
            return Pace(counts, self.count, timed=False)
        if rows not in self._pace:
            self._pace[rows] = Pace(counts, self.count)
        return self._pace[rows]

    def steppers_on(self, cache: Any) -> tuple[Stepper, Stepper | None]:
        """Of the model that verifies and of the one that drafts; kept for the same cache, with their graphs."""
        path = self.engine.path
        made_for = path, path.control.decoding if path.control else None
        if self._steppers is None or self._steppers[0] is not cache or self._steppers[1] != made_for:
            self._steppers = None  # their memory, before that of the next
            target = path.stepper(cache, sparse=False)
            drafting = None if self.draft is None else self.draft_path.stepper(cache, sparse=self.sparse)
            self._steppers = cache, made_for, target, drafting
        return self._steppers[2], self._steppers[3]

    @property
    def draft_path(self) -> Path:
        """Of the model that drafts: the same kind as that of the model that verifies."""
        path = self.engine.path
        if self.draft is self.engine.model:
            return path
        if self._draft_path is None or type(self._draft_path) is not type(path):
            kind, control = type(path), control_of(self.draft)
            reason = kind.unsupported(self.draft, control)
            if reason is not None:
                raise UsageError(f"this copy cannot draft on the {path.name} path (flag --speculate): {reason}")
            self._draft_path = kind(self.draft, control)
        return self._draft_path

    @property
    def counts(self) -> SparsityControl | None:
        """The control whose counter sees what drafts skip; None where they skip nothing."""
        return control_of(self.draft) if self.draft is not None and self.sparse else None
