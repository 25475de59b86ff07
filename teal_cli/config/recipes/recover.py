"""Options of recipe recover."""

from typing import Literal

from pydantic import Field

from teal_cli.config.recipes import RecipeOptions


class Options(RecipeOptions):
    """What recover has of its own."""

    gradient: Literal["masked", "straight-through"] = Field(
        "masked", description="gradient of a dropped input: none, or as if it had not been dropped"
    )
    thresholds: Literal["followed", "fixed"] = Field(
        "followed", description="while it trains: kept at their sparsities, or as they were at the beginning"
    )
    vectors: bool = Field(
        False, description="train only a constant vector a projection, kept as its bias; the weights stay as they are"
    )
