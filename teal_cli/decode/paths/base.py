"""What a decode path offers to the engine, and a session to the loop of steps.

A path is a way to take a step: `teal_cli.decode.engine.PATHS` lists them, the first that can decode a model does.
"""

from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from teal_cli.decode.compiling import Compiling
from teal_cli.decode.sampling import Sampler
from teal_cli.errors import UsageError
from teal_cli.models.forward import check_context, position_limit
from teal_cli.ranks.group import ranks_of
from teal_cli.sparse import SparsityControl


class Session(ABC):
    """Decoding of the sequences of one cache, each at its own position.

    A step is `begin`, `launch`, `choose`, `end`; what `launch` and `choose` do can be captured and replayed.
    """

    own_kernels: ClassVar[bool] = False
    """Whether all launches are ours: a capture that fails is then our fault."""
    counts_by_layer: ClassVar[bool] = True
    """Whether layers count dropped inputs on the host's side, which a replay would pass by."""

    cache: Any
    token: Tensor
    """(rows,) int64 on the device: the next step's input."""
    captures: bool
    """Whether `launch` can become a CUDA graph."""

    @property
    @abstractmethod
    def stale(self) -> bool:
        """Whether plan, control or cache have changed since: then another session must be opened."""

    @property
    def read_whole(self) -> frozenset[str]:
        """Projections that drop inputs by their rules, and of which steps read all, since that is faster."""
        return frozenset()

    @abstractmethod
    def launch(self) -> Tensor:
        """One step for every row: `token` in, (rows, vocabulary) logits out, which the next step may overwrite."""

    @abstractmethod
    def begin(self) -> None:
        """What the host does before a launch or replay."""

    @abstractmethod
    def end(self) -> None:
        """What the host does after a launch or replay."""

    def choose(self, sampler: Sampler, logits: Tensor) -> None:
        """Make a choice from the last launch's logits the next launch's `token`."""
        self.token.copy_(sampler.next_token(logits).view(-1))

    def step(self, token: Tensor) -> Tensor:
        """(rows, 1) int64 -> (rows, vocabulary) logits, which the next step may overwrite."""
        self.token.copy_(token.view(-1))
        self.begin()
        logits = self.launch()
        self.end()
        return logits


class Stepper(ABC):
    """Runs tokens of all sequences of one cache behind what is kept of it: several of each in one pass.

    What lies in the cache behind the kept positions is overwritten, so that two steppers (of a draft, and of the model
    that verifies it) may share a cache.
    """

    exact: bool = False
    """Whether a token has the bits that it has in a pass of its own, however many are in one."""
    spans: tuple[int, ...] = tuple(range(1, 9))
    """Tokens of each sequence that a pass may take, from 1 on up; those between two take as long as the greater."""

    @abstractmethod
    def run(self, tokens: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
        """One pass.

        Args:
            tokens: (rows, span) int64, of each sequence those that follow.
            lengths: positions of each sequence that are kept; the tokens stand behind them.

        Returns:
            (rows, span, vocabulary) logits and (rows, span) int64 where they are largest. The next pass may overwrite
            both.
        """


class Path(ABC):
    """One way to decode a model.

    Args:
        model: a transformers model in eval mode.
        control: of its sparse layers; None for a dense model.

    Raises:
        ArtefactError: a model that this path cannot decode, although it is the one for it.
    """

    name: ClassVar[str]
    reported: ClassVar[str] = "general"
    """What results of `teal bench` and `teal info` call it."""
    devices: ClassVar[tuple[str, ...] | None] = None
    """Types of device for which the engine considers this path by itself; None for all that torch has."""
    own_kernels: ClassVar[bool] = False
    """Whether a step is ours from end to end."""
    keeps_state: bool = True
    """Whether a step costs one token; False where every step runs the whole sequence again."""
    piece: int | None = None
    """Tokens of the pieces in which prompts can be run (`decode.prompts`); None where a prompt must be one pass."""

    def __init__(self, model: Any, control: SparsityControl | None) -> None:
        self.model, self.control = model, control
        self.device: torch.device = next(model.parameters()).device

    @classmethod
    @abstractmethod
    def unsupported(cls, model: Any, control: SparsityControl | None) -> str | None:
        """Why this path cannot decode a model, in a few words; None where it can."""

    @abstractmethod
    def new_cache(self, length: int) -> Any:
        """An empty cache for `length` positions."""

    @property
    def notes(self) -> list[str]:
        """What a user should know of it: how ranks sum, where several processes hold the model."""
        ranks = ranks_of(self.model)
        return [] if ranks is None else [f"sums over ranks by {'NCCL' if self.device.type == 'cuda' else 'Gloo'}"]

    def piece_for(self, positions: int) -> int | None:
        """`piece`, for a sequence that takes so many positions with its reply."""
        return self.piece

    def not_compiled_because(self, length: int) -> str | None:
        """Why steps are not compiled by torch.compile, in a few words; None where that can be tried.

        Args:
            length: positions of the cache.
        """
        return "its kernels are compiled already"

    def new_compiled_cache(self, length: int) -> Any:
        """An empty cache for `length` positions, whose steps are compiled; where `not_compiled_because` is None."""
        raise TypeError(f"path {self.name} compiles no steps")

    @abstractmethod
    def prefill(self, input_ids: Tensor, cache: Any, lengths: list[int] | None) -> Tensor:
        """Run prompts densely.

        Args:
            input_ids: (rows, tokens) int64, prompts that are shorter padded on the right.
            cache: empty, or with what stands before the prompts, as long in every row.
            lengths: tokens of each row's prompt, where they differ.

        Returns:
            (rows, vocabulary) logits of each row's last token.

        Raises:
            UsageError: `lengths`, and this path cannot decode such rows together.
        """

    @abstractmethod
    def open(self, cache: Any) -> Session:
        """Begin to decode after what a cache holds.

        Raises:
            UsageError: more rows than this path decodes together.
            ArtefactError: what it reads besides the model is damaged.
        """

    def cannot_step_back_because(self) -> str | None:
        """Why what was decoded cannot be taken back, in a few words; None where `stepper` runs several tokens."""
        return f"path {self.name} cannot take tokens back"

    def new_cache_for_steppers(self, length: int) -> Any:
        """An empty cache of which `stepper` can take tokens back."""
        return self.new_cache(length)

    def stepper(self, cache: Any, *, sparse: bool) -> Stepper:
        """What runs several tokens of each sequence of a prefilled cache, where `cannot_step_back_because` is None.

        Args:
            cache: of `new_cache_for_steppers`, of this path or of one like it, of a model with as many keys and values.
            sparse: whether single tokens skip inputs by the rules of the layers; several never do.
        """
        raise TypeError(f"path {self.name} cannot take tokens back")

    @property
    def max_length(self) -> int:
        """Positions that the model was made for."""
        return position_limit(self.model.config) or 1 << 31

    def check_length(self, prompt_tokens: int, new_tokens: int) -> None:
        """Fail before the work where the model's context cannot hold it.

        Raises:
            ArtefactError: more positions than the model has.
        """
        check_context(self.max_length, prompt_tokens, new_tokens)

    def without_cache(self, prompt: Tensor, tokens: Tensor) -> Tensor:
        """What decoding must give: (rows, tokens, vocabulary) logits after each token, from one pass over all.

        Args:
            prompt: (rows, prompt tokens) int64, dense.
            tokens: (rows, tokens) int64, as decoding runs them: sparse by masking, where that is on.
        """
        ids, keep = torch.cat([prompt, tokens], dim=1), tokens.shape[1]
        with self.control.masked(prompt.shape[1]) if self.control else nullcontext():
            logits: Tensor = self.model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits
        return logits[:, -keep:]


class Decoder(Protocol):
    """What the loop of steps and the checks before it need of an engine, which imports them."""

    model: Any
    device: torch.device
    control: SparsityControl | None
    path: Path

    never_worse: bool
    compiling: Compiling

    @property
    def max_length(self) -> int:
        """Positions that the model was made for."""
        ...

    def new_cache(self, length: int, compiled: bool = False) -> Any:
        """An empty cache."""
        ...

    def prefill(self, input_ids: Tensor, cache: Any) -> Tensor:
        """Logits after a prompt."""
        ...

    def open(self, cache: Any) -> Session:
        """The session on a prefilled cache."""
        ...

    def without_cache(self, prompt: Tensor, tokens: Tensor) -> Tensor:
        """What the logits of steps must be."""
        ...

    def check_numbers(self, logits: Tensor) -> None:
        """Refuse logits among which nothing can be chosen."""
        ...


def refuse_lengths(reason: str) -> UsageError:
    """The error of a path that cannot decode rows of different lengths together."""
    return UsageError(f"prompts of different lengths cannot be decoded together here: {reason}")


@dataclass(frozen=True)
class LastTokens:
    """Which logits of a prefill are wanted: those of each row's last token."""

    keep: int | Tensor
    """For `logits_to_keep`: how many from the end, or (n,) int64 positions that hold some row's last token."""
    own: Tensor | None
    """(rows,) int64: which of those positions is each row's; None where all rows end together."""

    @classmethod
    def of_rows(cls, lengths: list[int] | None, device: torch.device) -> "LastTokens":
        """Of prompts with these numbers of tokens; None where all are of one length."""
        if lengths is None:
            return cls(1, None)
        kept, own = torch.tensor([length - 1 for length in lengths], device=device).unique(return_inverse=True)
        return cls(kept, own)

    def among(self, logits: Tensor) -> Tensor:
        """(rows, kept, vocabulary) -> (rows, vocabulary)."""
        if self.own is None:
            return logits[:, -1]
        return logits[torch.arange(len(self.own), device=self.own.device), self.own]
