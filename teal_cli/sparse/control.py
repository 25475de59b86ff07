"""How a model's sparse layers behave right now: one object that all of them share."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from teal_cli.errors import MachineError
from teal_kernels import BackendUnavailableError, resolve_backend

Mode = Literal["auto", "dense", "masked"]


@dataclass
class _Tally:
    """Inputs seen and dropped by one projection."""

    seen: int = 0
    dropped: Tensor | int = 0
    """A 0-d tensor on the device until it is read, so that counting does not synchronise."""


class SparsityCounter:
    """Counts what is really dropped: realised sparsity, by projection and model-wide."""

    def __init__(self) -> None:
        self.active = True
        """Set to False to let calls go by uncounted."""
        self.output: str | None = None
        """The output layer, where it drops inputs: what it does not read counts, what it has does not."""
        self._tallies: dict[str, _Tally] = {}
        self._weights: dict[str, int] = {}
        self._sources: list[Callable[[], dict[str, tuple[int, int, int]]]] = []

    def add(self, name: str, parameters: int, seen: int, dropped: Tensor | int) -> None:
        """Count one call of a projection: the inputs that it could have dropped, and those that it did."""
        tally = self._tallies.setdefault(name, _Tally())
        self._weights[name] = parameters
        tally.seen += seen
        tally.dropped = tally.dropped + dropped

    def add_source(self, read: Callable[[], dict[str, tuple[int, int, int]]]) -> None:
        """Take counts from elsewhere too: projection -> parameters, inputs seen, inputs dropped, read when asked."""
        self._sources.append(read)

    def by_projection(self) -> dict[str, float]:
        """Realised sparsity of each projection that was called while sparsity was on; 0 where it drops nothing."""
        seen = {name: tally.seen for name, tally in self._tallies.items()}
        dropped = {name: int(tally.dropped) for name, tally in self._tallies.items()}
        for read in self._sources:
            for name, (parameters, more_seen, more_dropped) in read().items():
                self._weights[name] = parameters
                seen[name] = seen.get(name, 0) + more_seen
                dropped[name] = dropped.get(name, 0) + more_dropped
        return {name: dropped[name] / count for name, count in seen.items() if count}

    def model_wide(self) -> float | None:
        """Weights not read over the weights of the blocks' projections; None if sparsity was never on.

        The definition is `models.architectures.block_weights`'.
        """
        realised = self.by_projection()
        total = sum(self._weights[name] for name in realised if name != self.output)
        if not total:
            return None
        return sum(value * self._weights[name] for name, value in realised.items()) / total


@dataclass
class SparsityControl:
    """Shared state of the sparse layers of one model.

    `auto` is how a model is served: several tokens in a row are a prefill and run dense, a single
    token is a decode step and runs sparse. `dense` switches sparsity off. `masked` is for
    evaluation: many positions at once through dense products with masked inputs, which is the same
    mathematics as decoding them one by one; the first `dense_prefix` positions stay dense. An encoder
    does in `auto` what others do in `masked`. While `enabled` is False every mode is dense.
    """

    mode: Mode = "auto"
    enabled: bool = True
    backend: str = "auto"
    dense_prefix: int = 0
    output: str | None = None
    """The output layer, where it is sparse too. It may be given the last positions only, so the layers before it
    leave word of how many there are."""
    positions: int = field(default=1, repr=False)
    """Of the pass under way, where there is such an `output`."""
    counter: SparsityCounter | None = field(default=None, repr=False)
    flattens: bool = False
    """Whether some layers are given (batch * tokens, in): those that are not leave word of the shape."""
    shape: tuple[int, ...] = field(default=(1, 1), repr=False)
    """Batch and tokens of the pass under way, where `flattens`."""
    encodes: bool = False
    """Whether the model is an encoder: it has no decode step, and `auto` drops inputs at all positions."""
    plans_applied: int = field(default=0, repr=False)
    """Goes up whenever thresholds change."""

    @property
    def decodes_sparse(self) -> bool:
        """Whether a single token would run sparse now."""
        return self.enabled and self.mode != "dense"

    @property
    def decoding(self) -> tuple[bool, str, int]:
        """Changes with everything that a prepared decoding must know."""
        return self.decodes_sparse, self.backend, self.plans_applied

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """Every layer dense inside the block, whatever mode is chosen there."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Every layer dense inside the block."""
        with self._switched("dense", 0):
            yield

    @contextmanager
    def masked(self, dense_prefix: int) -> Iterator[None]:
        """Positions from `dense_prefix` on sparse, by masking, inside the block."""
        with self._switched("masked", dense_prefix):
            yield

    @contextmanager
    def _switched(self, mode: Mode, dense_prefix: int) -> Iterator[None]:
        before = self.mode, self.dense_prefix
        self.mode, self.dense_prefix = mode, dense_prefix
        try:
            yield
        finally:
            self.mode, self.dense_prefix = before

    @contextmanager
    def counting(self, counter: SparsityCounter | None = None) -> Iterator[SparsityCounter]:
        """Count dropped inputs inside the block, in a new counter or on in one that is there."""
        before, self.counter = self.counter, counter or SparsityCounter()
        self.counter.output = self.output
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
    from teal_cli.sparse.linear import SparseLinear

    for module in model.modules():
        if isinstance(module, SparseLinear):
            return module.control
    raise LookupError("the model has no sparse layers")


def use_backend(control: SparsityControl, backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Choose the backend of a model; the name of the one that will run.

    Raises:
        MachineError: a backend asked for by name cannot run here.
    """
    try:
        control.backend = resolve_backend(backend, device, dtype)
    except BackendUnavailableError as error:
        raise MachineError(f"backend {backend}: {error}; use --backend auto") from error
    return control.backend
