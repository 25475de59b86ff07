"""Options of recipe drelu."""

from pydantic import Field

from teal_cli.config.recipes import L1Options


class Options(L1Options):
    """What drelu has of its own."""

    l1: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="weight of an L1 loss at its largest, as of prosparse, which Turbo Sparse does without; 0: none",
    )
    flips: bool = Field(
        True, description="first flip signs of neurons, up and down together, so that more energy has up above 0"
    )
