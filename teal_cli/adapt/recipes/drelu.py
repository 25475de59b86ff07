"""drelu: ReLU of the gate and of up (Turbo Sparse, arXiv 2406.05955), after signs of neurons were flipped."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from teal_cli.adapt.neurons import flip_signs_
from teal_cli.adapt.recipe import Outcome
from teal_cli.adapt.swap import ActivationSwap
from teal_cli.config.recipes.drelu import Options


class DReLU(ActivationSwap):
    """Flips are ours: the dense model computes the same with them, and dReLU then cuts off the smaller half of each
    neuron. Gate first sees the zeros of the gate alone; those of up are skipped in `down`."""

    name = "drelu"
    activation = "drelu"
    _flipped = 0.0

    @property
    def _options(self) -> Options:
        assert isinstance(self.setting.options, Options)  # noqa: S101  (the configuration's word)
        return self.setting.options

    @property
    def _needs_measures(self) -> bool:
        return self._options.flips or self._l1 is not None

    def operate_(self, model: Any, measured: Mapping[str, Tensor]) -> None:
        """See `Recipe`."""
        if self._options.flips:
            self._flipped = flip_signs_(model, measured)
        super().operate_(model, measured)

    def outcome(self, model: Any, sequences: Tensor, notes: Mapping[str, Any]) -> Outcome:
        """See `ActivationSwap`."""
        return super().outcome(model, sequences, {**notes, "flipped": self._flipped})


RECIPE = DReLU
