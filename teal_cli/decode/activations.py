"""The activations of block programs: as configurations name them, and their numbers."""

from typing import Any

from torch.nn.functional import softplus

from teal_cli.decode.blocks import Product
from teal_cli.models.activations import zeroing_activation
from teal_cli.models.programs import Program

ACTIVATIONS = {
    **dict.fromkeys(("silu", "swish"), "silu"),
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "fatrelu": "fatrelu",
    "drelu": "drelu",
    "xielu": "xielu",
    "clamped_swiglu": "clamped_swiglu",  # of `ClampedExperts`, in programs alone
}
"""Activations as configurations name them, and as both paths do."""


def unknown_activation(config: Any, program: Program) -> str | None:
    """An activation of a program that no path has; None where they have all."""
    names = [step.activation_in(config) for step in program.products if step.activation is not None]
    return next((str(name) for name in names if name not in ACTIVATIONS), None)


def activation_of(product: Product) -> tuple[str | None, float]:
    """What a gated or activated product does, and the threshold of that; None of others."""
    if product.activation is None:
        return None, 0.0
    zeroing = product.gate_first.activation if product.gate_first else None
    if zeroing is None and product.owner is not None:
        zeroing = zeroing_activation(product.owner)
    if zeroing is not None:
        return zeroing.kind, zeroing.threshold
    return ACTIVATIONS[product.activation], float(getattr(product.owner, "limit", 0.0))


def curve_of(product: Product) -> tuple[float, ...]:
    """The numbers of an activation that has several.

    Of xIELU (arXiv 2411.13010) what a parabola above zero, an exponential below and a line are multiplied by; of a
    clamped SwiGLU its alpha; of others none.
    """
    if product.activation_module is not None:
        xielu: Any = product.activation_module
        positive, negative, line = (getattr(xielu, name).detach().float() for name in ("alpha_p", "alpha_n", "beta"))
        return float(softplus(positive)), float(softplus(negative) + line), float(line)
    if product.activation is not None and ACTIVATIONS[product.activation] == "clamped_swiglu":
        return (float(getattr(product.owner, "alpha")),)  # noqa: B009 (a module's attributes are of any type)
    return ()
