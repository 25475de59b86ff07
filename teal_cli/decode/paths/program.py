"""What the paths share that execute block programs (`teal_cli.decode.blocks`): the fused and the native one.

They work on the modules that `from_pretrained` gave: weights are read where they lie. The prefill is transformers'
forward, which fills their cache; the native path reads short prompts itself.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from teal_cli.decode.blocks import Attention, block_steps, last_norm
from teal_cli.decode.cache import FixedCache
from teal_cli.decode.paths.base import LastTokens, Path, Stepper
from teal_cli.decode.paths.graphs import SteppedSession
from teal_cli.decode.paths.program_session import ProgramSession
from teal_cli.decode.positions import has_dynamic_rope, long_rope_from
from teal_cli.decode.recognition import recognise_
from teal_cli.decode.row_levels import RowLevels
from teal_cli.errors import ArtefactError
from teal_cli.models.architectures import find_projections, program_for
from teal_cli.models.forward import rope_of
from teal_cli.models.likeness import adopt_likeness_
from teal_cli.models.programs import Program
from teal_cli.sparse import SparsityControl, lay_out_, replace_projections_

_PIECES = {"cpu": 64, "cuda": 512}
"""Tokens of a prompt in one pass: enough that a pass computes and does not wait, and so few that other sequences, which
wait for it, go on."""
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # angles that depend on the position alone


def known_program(model: Any) -> Program | None:
    """The program of a model's architecture; None where it has none, or no row.

    Of a type that the table does not have, of a row that it is like, where its steps are the model's.
    """
    adopt_likeness_(model)
    recognise_(model)
    try:
        return program_for(model)
    except ArtefactError:
        return None


def without_program(model: Any) -> str:
    """Why a model has no program, in a few words."""
    return str(getattr(model, "teal_differs", f"model type {model.config.model_type}"))


def unsupported_rope(config: Any, more: tuple[str, ...] = ()) -> str | None:
    """Why a model's rotary embedding cannot be a table of positions; None where it can. `more`: types that can too."""
    rope = rope_of(config)
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]  # of layers of a type, too
    names = [kind.get("rope_type", "default") for kind in kinds]
    return next((f"rope type {name}" for name in names if name not in (*_ROPE_TYPES, *more)), None)


def is_spread(model: Any) -> bool:
    """Whether weights lie on several devices, or come and go."""
    several = len({parameter.device for parameter in model.parameters()}) > 1
    return several or any(hasattr(module, "_hf_hook") for module in model.modules())


class ProgramPath(Path):
    """A path whose steps are those of a block program.

    The projections of a dense model become sparse layers that drop nothing, laid out for skipping inputs: their
    weights move, they are not copied.
    """

    own_kernels = True
    control: SparsityControl
    compiles: bool = False
    """Whether kernels can be compiled before they are launched (`ProgramSession.compile`)."""
    spans_are_exact: bool = False
    """As `Stepper.exact`."""

    def __init__(self, model: Any, control: SparsityControl | None) -> None:
        if control is None:
            control = replace_projections_(model, [projection.name for projection in find_projections(model)])
            lay_out_(model)
        super().__init__(model, control)
        self.blocks = block_steps(model)
        self.last_norm = last_norm(model)
        if not has_dynamic_rope(model):  # whose angles depend on the whole prompt
            self.piece = _PIECES.get(self.device.type, _PIECES["cuda"])

    def piece_for(self, positions: int) -> int | None:
        """As `Path.piece_for`: with long rope all angles of a pass are others where it reaches far enough."""
        first_long = long_rope_from(self.model)
        return self.piece if first_long is None or positions <= first_long else None

    @abstractmethod
    def open_rows(
        self,
        cache: FixedCache,
        levels: RowLevels | None,
        *,
        sparse: bool,
        span: int = 1,
    ) -> ProgramSession:
        """A session whose rows are taken by one sequence after the other, each at a level of sparsity of its own.

        Args:
            cache: whose rows they are.
            levels: that there are; None for the rules that the layers have.
            sparse: whether some row skips inputs; without, all are dense.
            span: tokens of each sequence that one step takes.
        """

    @abstractmethod
    def spans_for(self, sequences: int) -> tuple[int, ...]:
        """As `Stepper.spans`, of so many sequences."""

    def cannot_step_back_because(self) -> str | None:
        """As `Path.cannot_step_back_because`: where angles depend on the length of the text, so do those of a pass."""
        config = self.model.config.get_text_config()
        return unsupported_rope(config, ("proportional",))

    def stepper(self, cache: FixedCache, *, sparse: bool) -> Stepper:
        """As `Path.stepper`."""
        return ProgramStepper(self, cache, sparse=sparse)

    @property
    def attentions(self) -> int:
        """Attention steps of all blocks: each has a layer of the cache."""
        return len(self._attentions)

    @property
    def copies(self) -> int:
        """Of each key head, that the model's forward puts into a cache."""
        return next((step.copies for step in self._attentions), 1)

    @property
    def _attentions(self) -> list[Attention]:
        return [step for steps in self.blocks for step in steps if isinstance(step, Attention)]

    def prefill(self, input_ids: Tensor, cache: FixedCache, lengths: list[int] | None) -> Tensor:
        """As `Path.prefill`, by transformers' forward. What follows a prompt cannot change what it is.

        So padding needs no mask: decoding overwrites its positions in the cache, and sees none that it has not.
        """
        cache.check_extendable()
        before, last = cache.length, LastTokens.of_rows(lengths, self.device)
        with self.control.dense():  # the engine has no control of a dense model
            output = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=last.keep)
        if lengths is not None:
            cache.shorten([before + length for length in lengths])
        return last.among(output.logits)


class ProgramStepper(Stepper):
    """Steps of sessions, one for each number of tokens; on a GPU a graph of each."""

    def __init__(self, path: ProgramPath, cache: FixedCache, *, sparse: bool) -> None:
        self._path, self._cache, self._sparse = path, cache, sparse
        self._sessions: dict[int, SteppedSession] = {}
        self.exact, self.spans = path.spans_are_exact, path.spans_for(len(cache.row_lengths()))

    @torch.no_grad()
    def run(self, tokens: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
        """As `Stepper.run`."""
        rows, span = tokens.shape
        self._cache.shorten(lengths)
        if span not in self._sessions:
            sparse = self._sparse and span == 1
            opened = self._path.open_rows(self._cache, None, sparse=sparse, span=span)
            self._sessions[span] = SteppedSession(opened)
        session = self._sessions[span]
        session.place(lengths, [0] * (rows * span))
        logits, best = session.step([tokens.reshape(-1)])
        return logits.view(rows, span, -1), best.view(rows, span)
