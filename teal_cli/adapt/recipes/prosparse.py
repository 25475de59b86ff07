"""prosparse: ReLU, an L1 loss of neurons that grows, and FATReLU (arXiv 2402.13516)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn

from teal_cli.adapt.followed import FollowedGates
from teal_cli.adapt.multiplier import along_sine
from teal_cli.adapt.neurons import gate_quantiles
from teal_cli.adapt.recipe import Batch, Outcome, Progress, Stage
from teal_cli.adapt.swap import ActivationSwap
from teal_cli.config.recipes.prosparse import Options
from teal_cli.models.activations import FatReLU, activation_name, neuron_modules, set_activation_

_GROWN = 0.6
"""Share of the steps after which FATReLU drops all that it is to drop."""


class ProSparse(ActivationSwap):
    """Four things depart from the paper: the L1 is a mean in units of the dense model's neurons, the weight can be
    steered to a share of zeros, FATReLU's threshold is each layer's quantile of live gates, not one number, and FATReLU
    can be there from the beginning (option `fatrelu`): the share that it drops then grows along half a sine, and the
    model trains under it."""

    name = "prosparse"
    activation = "relu"

    @property
    def _options(self) -> Options:
        assert isinstance(self.setting.options, Options)  # noqa: S101  (the configuration's word)
        return self.setting.options

    def operate_(self, model: Any, measured: Mapping[str, Tensor]) -> None:
        """See `Recipe`."""
        super().operate_(model, measured)
        self._gates: FollowedGates | None = None
        if self._grows:
            acts = [getattr(module, activation_name(module)) for _, module in neuron_modules(model)]
            self._gates = FollowedGates(cast(list[FatReLU], acts), model.device)
        self.followed = self._gates

    def swap_(self, model: Any) -> None:
        """See `ActivationSwap`."""
        if not self._grows:
            super().swap_(model)
            return
        set_activation_(model, "fatrelu", [0.0] * model.config.get_text_config().num_hidden_layers)

    @property
    def _grows(self) -> bool:
        return self._options.fatrelu == "grown" and self._options.live_dropped > 0

    def stages(self, steps: int) -> Sequence[Stage]:
        """See `Recipe`."""
        return [replace(stage, keep_best=stage.keep_best and not self._grows) for stage in super().stages(steps)]

    @contextmanager
    def student_pass(self, model: nn.Module, batch: Batch) -> Iterator[None]:
        """See `Recipe`."""
        with super().student_pass(model, batch), self.follows(model, batch):
            yield

    def before_pass_(self, at: float) -> None:
        """See `Recipe`."""
        if self._gates is not None:
            self._gates.drop_(along_sine(0.0, self._options.live_dropped, min(1.0, at / _GROWN)))
        super().before_pass_(at)

    def figures(self, progress: Progress) -> dict[str, float]:
        """See `Recipe`."""
        found = super().figures(progress)
        return found if self._gates is None else {**found, "live_dropped": self._gates.share}

    def finish_(self, model: Any, sequences: Tensor) -> Outcome:
        """See `Recipe`."""
        self._neurons.let_go()
        share, notes = self._options.live_dropped, {}
        if not share:
            return self.outcome(model, sequences, {})
        if not self._grows:
            notes["zeros_with_relu"] = self.outcome(model, sequences, {}).notes["zeros"]
        set_activation_(model, "fatrelu", gate_quantiles(model, sequences, share))
        return self.outcome(model, sequences, notes)


RECIPE = ProSparse
