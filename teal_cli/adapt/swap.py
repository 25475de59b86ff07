"""What recipes have in common that put another activation in the place of a model's own: relu, prosparse, drelu."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from teal_cli.adapt.multiplier import Steering, staged
from teal_cli.adapt.neurons import Neurons, measure, shares_of_zeros
from teal_cli.adapt.recipe import Batch, Outcome, Progress, Recipe, Stage
from teal_cli.config.recipes import L1Options
from teal_cli.errors import UsageError
from teal_cli.models.activations import activation_keys, activation_name, neuron_modules, set_activation_


class ActivationSwap(Recipe):
    """An activation that makes zeros in the place of the model's own, and where it is wanted an L1 loss of neurons.

    The loss is the mean of |x1| over tokens and neurons (x1 is what `down` reads), divided by what it was in the layer
    of the dense model, so that its weight means the same in every layer and model; the mean of that over layers.
    """

    takes_sparsity = False
    activation: ClassVar[str]
    """As configurations name it."""

    def check(self, model: nn.Module) -> None:
        """See `Recipe`."""
        options = self.setting.options
        if isinstance(options, L1Options) and options.zeros is not None and not options.l1:
            raise UsageError("option zeros steers the weight of the L1 loss: give l1, the weight that it begins with")
        set_activation_(copy.deepcopy(model), self.activation)

    def measure(self, model: nn.Module, sequences: Tensor) -> dict[str, Tensor]:
        """See `Recipe`."""
        return measure(model, sequences) if self._needs_measures else {}

    @property
    def _needs_measures(self) -> bool:
        return self._l1 is not None

    @property
    def _l1(self) -> L1Options | None:
        """None where there is no such loss."""
        options = self.setting.options
        return options if isinstance(options, L1Options) and options.l1 else None

    def stages(self, steps: int) -> Sequence[Stage]:
        """One; the weights that do best are those of the end where zeros grow on the way."""
        return [Stage(self.name, steps, keep_best=self._l1 is None)]

    def operate_(self, model: nn.Module, measured: Mapping[str, Tensor]) -> None:
        """See `Recipe`."""
        self._places: list[tuple[Any, Any]] = [(module, type(module)) for _, module in neuron_modules(model)]
        self._dense = [getattr(module, activation_name(module)) for module, _ in self._places]
        self.swap_(model)
        self._steering = None
        if self._l1 is not None and self._l1.zeros is not None:
            self._steering = Steering(self._l1.l1, self._l1.zeros)
        self._neurons = Neurons(model, None if self._l1 is None else measured["scales"])
        self._zeros, self._weight = (0.0, 0.0), 0.0

    def swap_(self, model: nn.Module) -> None:
        """Put the activation in its place."""
        set_activation_(model, self.activation)

    @property
    def can_replay(self) -> bool:
        """See `Recipe`."""
        return self._l1 is None

    def left(self) -> Any:
        """See `Recipe`."""
        return self._neurons.seen, super().left()

    def take_left_(self, left: Any) -> None:
        """See `Recipe`."""
        self._neurons.seen, of_looks = left
        super().take_left_(of_looks)

    def student_pass(self, model: nn.Module, batch: Batch) -> AbstractContextManager[Any]:
        """See `Recipe`."""
        return self._neurons.recomputing() if batch.again else self._neurons.watching()

    @contextmanager
    def as_dense(self, model: nn.Module) -> Iterator[None]:
        """See `Recipe`."""
        trained = []
        for (module, kind), dense in zip(self._places, self._dense, strict=True):
            name = activation_name(module)
            trained.append((module, type(module), name, getattr(module, name), vars(module).get("activates_up")))
            module.__class__ = kind
            if "activates_up" in vars(module):  # of experts
                module.activates_up = False
            setattr(module, name, dense)
        try:
            yield
        finally:
            for module, kind, name, activation, of_both in trained:
                module.__class__ = kind
                setattr(module, name, activation)
                if of_both is not None:
                    module.activates_up = of_both

    def realised_sparsity(self) -> float | None:
        """The share of zeros in what `down` reads."""
        self._zeros = self._neurons.zeros()
        return self._zeros[1]

    def extra_loss(self, progress: Progress) -> Tensor | None:
        """The L1 loss; see `Recipe`."""
        if self._l1 is None:
            return None
        size = self._neurons.size()
        if torch.is_grad_enabled():  # looks at the held-out text steer nothing
            self._weight = self._weight_at(progress)
        return size * self._weight

    def _weight_at(self, progress: Progress) -> float:
        assert self._l1 is not None  # noqa: S101  (there is a loss)
        at = progress.step / progress.steps
        if self._steering is not None:
            return self._steering.weight(at, self._zeros[1], progress.share_of_pass)
        return self._l1.l1 * (staged(at, self._l1.stages) if self._l1.growth == "progressive" else 1.0)

    def figures(self, progress: Progress) -> dict[str, float]:
        """See `Recipe`; gate first sees only the zeros of gates."""
        found = {"gate_zeros": self._zeros[0], "hidden_zeros": self._zeros[1]}
        return found if self._l1 is None else {**found, "l1_weight": self._weight}

    def state(self) -> dict[str, Tensor]:
        """See `Recipe`."""
        steering, found = self._steering, super().state()
        if steering is None or steering.start is None:
            return found
        return {**found, "steering": torch.tensor([steering.start, steering.total], dtype=torch.float64)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """See `Recipe`."""
        super().load_state(state)
        if self._steering is not None and "steering" in state:
            self._steering.start, self._steering.total = state["steering"].tolist()

    def finish_(self, model: nn.Module, sequences: Tensor) -> Outcome:
        """See `Recipe`."""
        self._neurons.let_go()
        return self.outcome(model, sequences, {})

    def outcome(self, model: Any, sequences: Tensor, notes: Mapping[str, Any]) -> Outcome:
        """An ordinary folder, whose configuration says the activation; and which zeros it makes, layer by layer."""
        text = model.config.get_text_config()
        entries = {key: getattr(text, key) for key in activation_keys(text)}
        if text is not model.config:
            name = next(name for name, value in vars(model.config).items() if value is text)
            entries = {name: {**text.to_diff_dict(), **entries}}
        return Outcome(config=entries, notes={**notes, "zeros": shares_of_zeros(model, sequences)})
