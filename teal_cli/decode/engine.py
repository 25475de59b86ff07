"""The decode engine: a cache, a dense prefill, and steps of one token.

How a step is taken is a decode path's matter (`teal_cli.decode.paths`). The engine picks the path, checks it, and
runs `TokenLoop` on its sessions.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from teal_cli.decode.choice import Choice, Forms, choose
from teal_cli.decode.compiling import Compiling, compiled_positions
from teal_cli.decode.loop import TokenLoop
from teal_cli.decode.paths.base import Path, Session
from teal_cli.decode.paths.fused import FusedPath, unsupported_on
from teal_cli.decode.paths.general import GeneralPath
from teal_cli.decode.paths.native import NativePath, unsupported_on_cpu
from teal_cli.decode.paths.seq2seq import Seq2SeqPath
from teal_cli.decode.probe import OtherLogitsError, check_decoding
from teal_cli.decode.prompts import Keep, KeptCache, pieces
from teal_cli.decode.reading import Reading
from teal_cli.decode.recognition import first_difference
from teal_cli.decode.sampling import Sampler, SamplingConfig
from teal_cli.errors import ArtefactError, UsageError
from teal_cli.models.architectures import kind_for
from teal_cli.sparse import SparsityControl, control_of

PATHS: tuple[type[Path], ...] = (FusedPath, NativePath, Seq2SeqPath, GeneralPath)
"""Decode paths, the fastest first."""


def expected_path(model: Any, device: torch.device, dtype: torch.dtype) -> tuple[str, str | None]:
    """How a dense model, or its outline, would decode on a device: `Path.reported`, and why that is `general`."""
    if device.type == "cpu":
        kind: type[Path] = NativePath
        because = unsupported_on_cpu(model, dtype, "auto")
    else:
        kind, because = FusedPath, unsupported_on(model, device, dtype, "auto")
    return (kind if because is None else GeneralPath).reported, because


_READ_BEHIND = 4
"""Steps that a GPU may run ahead of the host, which reads each token only to show it and to stop."""


class Engine:
    """Decodes with a dense or sparse transformers model.

    The prefill is dense whatever its length (a prompt of a single token too); every step after it
    runs sparse where the model has sparse layers.

    Args:
        model: a language model in eval mode. On a GPU the projections of a dense one may be laid
            out for the kernels (their weights move, they are not copied).
        path: the name of a decode path, which is then taken or refused; by default the first of `PATHS` that can
            decode the model.
        never_worse: whether `generate` decodes dense where sparse steps were measured to be slower (`choose`).
        compiling: whether steps are compiled by torch.compile, where the path has any to compile; by default never.
        keep: what `generate` keeps of its cache for the next prompt, if that begins alike, where the path can go on
            from a part of a prompt.

    Raises:
        ArtefactError: an encoder, which does not decode, or a model whose state teal does not know.
        UsageError: a path asked for by name that cannot decode this model.
    """

    def __init__(
        self,
        model: Any,
        *,
        path: str | None = None,
        never_worse: bool = False,
        compiling: Compiling | None = None,
        keep: Keep = "nothing",
    ) -> None:
        if kind_for(model) == "encoder":
            raise ArtefactError("this model is an encoder: it writes no text (`teal eval` measures it)")
        self.model = model
        self.device: torch.device = next(model.parameters()).device
        self.never_worse, self.compiling, self.keep = never_worse, compiling or Compiling(), keep
        self.control: SparsityControl | None
        try:
            self.control = control_of(model)
        except LookupError:
            self.control = None
        self.general_because: str | None = None
        """Why no path of our own is taken, where one is for this device."""
        self.path = self._pick(path)
        self._named = path is not None
        self._session: Session | None = None
        self._kept: KeptCache | None = None
        self._checked: set[tuple[bool, str, int]] = set()
        self._choices: dict[tuple[Any, int, int], Choice] = {}
        self._dense_forms: dict[tuple[int, int], Forms] = {}

    def _pick(self, name: str | None) -> Path:
        """The first path that can decode the model, or the one of a name."""
        for kind in PATHS:
            elsewhere = kind.devices is not None and self.device.type not in kind.devices
            if name not in (None, kind.name) or (name is None and elsewhere):
                continue
            reason = kind.unsupported(self.model, self.control)
            if reason is None:
                if kind.own_kernels:
                    self.general_because = None
                return kind(self.model, self.control)
            if kind.own_kernels:
                self.general_because = self.general_because or reason
            if name is not None:
                raise UsageError(f"decode path {name} cannot decode this model: {reason}")
        raise UsageError(f"there is no decode path {name}, but {', '.join(kind.name for kind in PATHS)}")

    @property
    def max_length(self) -> int:
        """Positions that the model was made for."""
        return self.path.max_length

    @property
    def keeps_state(self) -> bool:
        """Whether a step costs one token; False where every step runs the whole sequence again."""
        return self.path.keeps_state

    @property
    def chooses(self) -> bool:
        """Whether something is left to be measured before a reply (`choose`)."""
        return self.never_worse or self.compiling.is_tried

    def new_cache(self, length: int, compiled: bool = False) -> Any:
        """An empty cache of the path for `length` positions; the steps of some are compiled (`Choice.compiled`)."""
        self._session = None  # the memory of the last cache, before that of the next
        return self.path.new_compiled_cache(length) if compiled else self.path.new_cache(length)

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, cache: Any, lengths: Tensor | None = None) -> Tensor:
        """Run prompts densely.

        Args:
            input_ids: (rows, tokens) int64; shorter prompts are padded on the right, with any token.
            cache: empty, or with what stands before the prompts.
            lengths: (rows,) int64 tokens of each prompt; by default all are as long as `input_ids`. Rows of different
                lengths then decode together, each at its own position.

        Returns:
            (rows, vocabulary) logits of each row's last token.

        Raises:
            UsageError: `lengths` that do not fit `input_ids`, or that differ where the path cannot decode such rows
                together.
        """
        found = None if lengths is None else _different(lengths, input_ids)
        with self.control.dense() if self.control else nullcontext():
            return self.path.prefill(input_ids, cache, found)

    @torch.no_grad()
    def step(self, token: Tensor, cache: Any) -> Tensor:
        """One decode step: (rows, 1) int64 -> (rows, vocabulary) logits."""
        return self.open(cache).step(token).clone()

    def open(self, cache: Any) -> Session:
        """The session on a prefilled cache."""
        if self._session is None or self._session.cache is not cache or self._session.stale:
            self._session = None  # before the next one takes its memory
            self._session = self.path.open(cache)
        return self._session

    @torch.no_grad()
    def without_cache(self, prompt: Tensor, tokens: Tensor) -> Tensor:
        """What decoding must give: (rows, tokens, vocabulary) logits after each token, from one pass over all.

        Args:
            prompt: (rows, prompt tokens) int64, dense.
            tokens: (rows, tokens) int64, as decoding runs them: sparse by masking, where that is on.
        """
        return self.path.without_cache(prompt, tokens)

    def check(self, prompt: Tensor) -> None:
        """Make sure, once for a path, that a step gives what a pass without a cache gives (`probe.check_decoding`).

        Args:
            prompt: (rows, tokens) int64 that is going to be decoded. Its first tokens are tried as rows of one
                length, whatever is padding in them.

        Raises:
            ArtefactError: it does not, and there is no other path.
        """
        control, rows = self.control, prompt.shape[0]
        if not self.keeps_state:
            return
        with control.uncounted() if control else nullcontext():
            if (path := (False, "", rows)) not in self._checked:
                with control.switched_off() if control else nullcontext():
                    self._check_decoding(prompt)
                self._checked.add(path)
            if control is not None and (path := (*control.decoding[:2], rows)) not in self._checked:
                self._check_decoding(prompt)
                self._checked.add(path)

    def _check_decoding(self, prompt: Tensor) -> None:
        """Where a path of our own gives other logits and was not asked for by name, the general one takes its place."""
        try:
            check_decoding(self, prompt)
        except OtherLogitsError:
            if not self.path.own_kernels or self._named:
                raise
            step = None
            with suppress(Exception):  # it only says more, of a model that may be odd in any way
                step = first_difference(self.model)
            self.general_because = f"the {self.path.name} path gives other logits" + (f": {step}" if step else "")
            self._session = None
            self._choices.clear()
            self._dense_forms.clear()
            self._checked.clear()
            self.path = GeneralPath(self.model, self.control)
            check_decoding(self, prompt)

    def choose(self, prompt: Tensor, positions: int = 0) -> Choice:
        """What `auto` decodes, sparse or dense, compiled or not: measured once for a plan, rows and positions.

        Args:
            prompt: (rows, tokens) int64 that is going to be decoded.
            positions: of the cache; they matter where steps are compiled.

        Raises:
            MachineError: compiled steps were asked for by name, and there are none.
        """
        made_for = compiled_positions(positions) if self.compiling.is_tried else 0
        key = (self.control.decoding if self.control else None), prompt.shape[0], made_for
        if key not in self._choices:
            self._choices[key] = choose(self, prompt, positions, self._dense_forms.get(key[1:]))
            if (dense := self._choices[key].form("dense")) is not None:
                self._dense_forms[key[1:]] = dense
        return self._choices[key]

    def check_prompt(self, input_ids: Tensor, new_tokens: int) -> None:
        """Everything that can be said before a reply; what takes time does so once (`check`, `choose`).

        Raises:
            ArtefactError: an empty prompt, more positions than the model has, or a model that loses its state.
        """
        if input_ids.shape[1] == 0:
            raise ArtefactError("the prompt has no tokens")
        self.check_length(input_ids.shape[1], new_tokens)
        self.check(input_ids)
        if self.chooses:
            self.choose(input_ids, input_ids.shape[1] + new_tokens)

    def check_length(self, prompt_tokens: int, new_tokens: int) -> None:
        """Fail before the work where the model's context cannot hold it.

        Raises:
            ArtefactError: more positions than the model has.
        """
        self.path.check_length(prompt_tokens, new_tokens)

    def generate(
        self, input_ids: Tensor, *, max_new_tokens: int, sampling: SamplingConfig, stop: frozenset[int] = frozenset()
    ) -> Iterator[int]:
        """Yield tokens as they are decoded; a stop token ends the sequence and is not yielded.

        On a GPU a few steps are always under way when a token is yielded, so that nobody waits for
        the host; at a stop token they are thrown away.

        Args:
            input_ids: (1, tokens) int64 prompt.
            max_new_tokens: at most this many.
            sampling: how tokens are chosen.
            stop: token ids that end the reply.

        Raises:
            ArtefactError: an empty prompt, more positions than the model has, logits that are not numbers, or steps
                that do not give what a pass without a cache gives.
        """
        self.check_prompt(input_ids, max_new_tokens)
        length = input_ids.shape[1] + max_new_tokens
        choice = self.choose(input_ids, length) if self.chooses else None
        sampler = Sampler(sampling, self.device)
        kept, (cache, logits) = self.run_prompt(input_ids.to(self.device), length, choice)
        self.check_numbers(logits)  # the host waits for the first token anyway
        token = sampler.next_token(logits)
        with self._as(choice):
            loop = TokenLoop(self, cache, token, sampler)
        under_way = deque([Reading(token)])
        launched = 1
        for index in range(max_new_tokens):
            ahead = _READ_BEHIND if self.device.type == "cuda" and index > 0 else 0
            while launched < max_new_tokens and launched <= index + ahead:
                with self._as(choice):
                    under_way.append(Reading(loop.advance()))
                launched += 1
            value = under_way.popleft().value()
            if kept is not None:
                kept.add(value)
            if value in stop:
                return
            yield value

    def run_prompt(
        self, input_ids: Tensor, length: int, choice: Choice | None
    ) -> tuple[KeptCache | None, tuple[Any, Tensor]]:
        """A cache for so many positions that holds the prompt, with its logits; and what keeps it for the next one."""
        compiled, piece = choice is not None and choice.compiled, self.path.piece_for(length)
        if self.keep == "nothing" or compiled or piece is None:
            self._kept = None
            cache, logits = self.new_cache(length, compiled), torch.empty(0)
            for start, end in pieces(0, input_ids.shape[1], None if compiled else piece):
                logits = self.prefill(input_ids[:, start:end], cache)
            return None, (cache, logits)
        if self._kept is None or self._kept.path is not self.path:
            self._kept = KeptCache(self.path, self.keep)
        self._session = None  # the memory of the last reply's, before that of the next
        return self._kept, self._kept.run(self.prefill, input_ids, length)

    def _as(self, choice: Choice | None) -> AbstractContextManager[None]:
        """Dense inside the block where that was the choice."""
        dense = self.control is not None and choice is not None and choice.decodes == "dense"
        return self.control.switched_off() if dense and self.control else nullcontext()

    def check_numbers(self, logits: Tensor) -> None:
        """Refuse logits among which nothing can be chosen. Some may be -inf: a model can rule tokens out.

        Args:
            logits: (..., vocabulary).

        Raises:
            ArtefactError: a NaN, an infinite one, or nothing but -inf.
        """
        if not bool(logits.amax(-1).isfinite().all()):
            dtype = str(self.model.dtype).removeprefix("torch.")
            raise ArtefactError(
                f"the model's logits are not numbers (NaN or infinite) in {dtype}: its weights are damaged, or that "
                "dtype is too narrow for them (--dtype float32)"
            )


def _different(lengths: Tensor, input_ids: Tensor) -> list[int] | None:
    """Lengths of prompts; None where all are as long as `input_ids`.

    Raises:
        UsageError: not one for each row, or out of range.
    """
    rows, tokens = input_ids.shape
    found: list[int] = lengths.tolist()
    if lengths.shape != (rows,) or not all(1 <= length <= tokens for length in found):
        raise UsageError(f"lengths {found} do not fit {rows} prompts of at most {tokens} tokens")
    return None if all(length == tokens for length in found) else found
