"""relu: ReLU in the place of the activation, and distillation: the arm that others are held against."""

from teal_cli.adapt.swap import ActivationSwap


class ReLU(ActivationSwap):
    """Exact zeros where the gate is below 0, and nothing that asks for more of them (ReLU Strikes Back, arXiv
    2310.04564)."""

    name = "relu"
    activation = "relu"


RECIPE = ReLU
