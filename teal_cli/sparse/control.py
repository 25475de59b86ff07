"""How a model's sparse layers behave right now: one object that all of them share."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol
from weakref import WeakSet

import torch
from torch import Tensor, nn

from teal_cli.errors import MachineError
from teal_cli.ranks.group import Ranks
from teal_cli.sparse.context import PassContext, Phase, shape_of_inputs
from teal_cli.sparse.counting import SparsityCounter
from teal_kernels import BackendUnavailableError, resolve_backend

Mode = Literal["auto", "dense", "masked"]


class Prepared(Protocol):
    """What was made of a model's layers as they are, and holds their weights."""

    def let_go(self) -> None:
        """Hold them no longer."""
        ...


@dataclass
class SparsityControl:
    """Shared state of the sparse layers of one model: what is asked of passes, and the context of the one under way.

    `auto` is how a model is served: several tokens in a row are a prefill and run dense, a single
    token is a decode step and runs sparse. `dense` switches sparsity off. `masked` is for
    evaluation: many positions at once through dense products with masked inputs, which is the same
    mathematics as decoding them one by one; the first `dense_prefix` positions stay dense. An encoder
    does in `auto` what others do in `masked`. While `enabled` is False every mode is dense.
    """

    mode: Mode = "auto"
    enabled: bool = True
    backend: str = "auto"
    dense_prefix: int | Tensor = 0
    """Of all rows, or (batch,) int64: rows whose prompts differ in length."""
    output: str | None = None
    """The output layer, where it is sparse too."""
    of_routers: int = 0
    """Weights of all routers, which every token reads."""
    counter: SparsityCounter | None = field(default=None, repr=False)
    encodes: bool = False
    """Whether the model is an encoder: it has no decode step, and `auto` drops inputs at all positions."""
    ranks: Ranks | None = field(default=None, repr=False)
    """That hold the model together: what is counted is counted over all."""
    whole: Mapping[str, int] = field(default_factory=dict, repr=False)
    """Then the weights of each layer, as no rank may hold all of them."""
    straight_through: bool = False
    """In training: a dropped input of a masked pass gets the gradient that it would get if it were kept."""
    context: PassContext | None = field(default=None, repr=False)
    """Of the pass under way."""
    plans_applied: int = field(default=0, repr=False)
    """Goes up whenever thresholds change."""
    prepared: "WeakSet[Prepared]" = field(default_factory=WeakSet, repr=False)
    """Told before thresholds change, which may move the weights."""

    @property
    def decodes_sparse(self) -> bool:
        """Whether a single token would run sparse now."""
        return self.enabled and self.mode != "dense"

    @property
    def decoding(self) -> tuple[bool, str, int]:
        """Changes with everything that a prepared decoding must know."""
        return self.decodes_sparse, self.backend, self.plans_applied

    def change_plan(self) -> None:
        """Thresholds are about to change: all that was prepared for others is of no use any more."""
        self.plans_applied += 1
        for prepared in list(self.prepared):
            prepared.let_go()
        self.prepared.clear()

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "prepared"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__ |= state
        self.prepared = WeakSet()  # of a copy nothing is prepared

    def context_of(self, batch: int, tokens: int, module: nn.Module | None = None) -> PassContext:
        """The context of a pass.

        Args:
            batch: rows.
            tokens: positions of each row.
            module: whose call it is.
        """
        several, phase = tokens > 1, self._phase(tokens)
        counter = self.counter if self.counter is not None and self.counter.active and phase != "dense" else None
        start = self.dense_prefix if self.mode == "masked" else 0
        return PassContext(phase, batch, tokens, start, several or self.mode == "dense", counter, module)

    def _phase(self, tokens: int) -> Phase:
        if not self.enabled or self.mode == "dense":
            return "dense"
        if self.mode == "masked" or self.encodes:
            return "masked"
        return "dense" if tokens > 1 else "decode"

    def context_alone(self, x: Tensor) -> PassContext:
        """The context of a layer that is called by itself with (..., tokens, in)."""
        tokens = x.shape[-2] if x.dim() > 1 else 1
        return self.context_of(x.numel() // max(tokens * x.shape[-1], 1), tokens)

    def begin_pass(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A pre-hook: the pass of a model, or of a stack of its blocks, begins."""
        shape = shape_of_inputs(args, kwargs)
        if shape is None:
            return
        outer = around = self.context
        while around is not None:
            if around.module is module:  # left behind by a call that was interrupted
                outer = around.outer
                break
            around = around.outer
        self.context = self.context_of(*shape, module)
        self.context.outer = outer

    def end_pass(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A hook that is always called: the pass is over, or failed."""
        if self.context is not None and self.context.module is module:
            self.context = self.context.outer

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """Every layer dense inside the block, whatever mode is chosen there."""
        before, self.enabled = (self.enabled, self.context), False
        self.context = None
        try:
            yield
        finally:
            self.enabled, self.context = before

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Every layer dense inside the block."""
        with self._switched("dense", 0):
            yield

    @contextmanager
    def masked(self, dense_prefix: int | Tensor) -> Iterator[None]:
        """Positions from `dense_prefix` on sparse, by masking, inside the block.

        Args:
            dense_prefix: of all rows, or (batch,) int64.
        """
        with self._switched("masked", dense_prefix):
            yield

    @contextmanager
    def _switched(self, mode: Mode, dense_prefix: int | Tensor) -> Iterator[None]:
        before = self.mode, self.dense_prefix, self.context
        # Of a pass that is under way (a hook may ask for this): it knows nothing of the new mode, and goes on after it.
        self.mode, self.dense_prefix, self.context = mode, dense_prefix, None
        try:
            yield
        finally:
            self.mode, self.dense_prefix, self.context = before  # an interrupt ends a pass without its hook

    @contextmanager
    def counting(self, counter: SparsityCounter | None = None) -> Iterator[SparsityCounter]:
        """Count dropped inputs inside the block, in a new counter or on in one that is there."""
        before, self.counter = self.counter, counter or SparsityCounter()
        self.counter.output, self.counter.beside = self.output, self.of_routers
        self.counter.ranks, self.counter.whole = self.ranks, self.whole
        try:
            yield self.counter
        finally:
            self.counter = before

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Nothing is counted inside the block."""
        before, self.counter = self.counter, None
        try:
            yield
        finally:
            self.counter = before


def control_of(model: nn.Module) -> SparsityControl:
    """The control of a sparse model.

    Raises:
        LookupError: the model has no sparse layers.
    """
    for module in model.modules():
        control = getattr(module, "control", None)
        if isinstance(control, SparsityControl):
            return control
    raise LookupError("the model has no sparse layers")


def use_backend(control: SparsityControl, backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Choose the backend of a model; the name of the one that will run.

    Raises:
        MachineError: a backend asked for by name cannot run here.
    """
    control.backend = backend_for(backend, device, dtype)
    return control.backend


def backend_for(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the backend that will run, where this one is asked for.

    Raises:
        MachineError: a backend asked for by name cannot run here.
    """
    try:
        return resolve_backend(backend, device, dtype)
    except BackendUnavailableError as error:
        raise MachineError(f"backend {backend}: {error}; use --backend auto") from error
