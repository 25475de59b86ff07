"""prosparse: ReLU, an L1 loss of neurons that grows, and FATReLU at the end (arXiv 2402.13516)."""

from typing import Any

from torch import Tensor

from teal_cli.adapt.neurons import gate_quantiles
from teal_cli.adapt.recipe import Outcome
from teal_cli.adapt.swap import ActivationSwap
from teal_cli.config.recipes.prosparse import Options
from teal_cli.models.activations import set_activation_


class ProSparse(ActivationSwap):
    """Three things depart from the paper: the L1 is a mean in units of the dense model's neurons, the weight can be
    steered to a share of zeros, and FATReLU's threshold is each layer's quantile of live gates, not one number."""

    name = "prosparse"
    activation = "relu"

    def finish_(self, model: Any, sequences: Tensor) -> Outcome:
        """See `Recipe`."""
        self._neurons.let_go()
        options = self.setting.options
        assert isinstance(options, Options)  # noqa: S101  (the configuration's word)
        if not options.live_dropped:
            return self.outcome(model, sequences, {})
        before = self.outcome(model, sequences, {}).notes["zeros"]
        thresholds = gate_quantiles(model, sequences, options.live_dropped)
        set_activation_(model, "fatrelu", thresholds)
        return self.outcome(model, sequences, {"zeros_with_relu": before})


RECIPE = ProSparse
