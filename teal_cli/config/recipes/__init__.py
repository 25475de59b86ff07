"""The options that each recipe of `teal adapt` has of its own: one module each, named as the recipe, with `Options`.

A recipe is here by having a module in this package; its code is the module of the same name in `adapt/recipes`.
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class RecipeOptions(BaseModel):
    """Options of one recipe. Keys of YAML's `options`, or of the flag `--options KEY=VALUE,KEY=VALUE`."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


Weights = tuple[tuple[float, float], ...]
"""Stages: where each ends, as a share of the steps, and its weight."""


class L1Options(RecipeOptions):
    """Options of recipes that make neurons zero by an L1 loss."""

    l1: float = Field(
        0.1,
        ge=0,
        le=1e6,
        description="weight of the L1 loss at its largest; the loss is 1 for neurons as large as the dense model's",
    )
    growth: Literal["progressive", "fixed"] = Field(
        "progressive", description="how the weight grows: stage by stage along sines, or not at all"
    )
    stages: Weights = Field(
        ((0.1, 0.0), (0.15, 0.05), (0.35, 0.3), (0.45, 0.3), (0.7, 1.0), (1.0, 1.0)),
        description="of progressive growth: where each stage ends, a share of the steps, and its weight, a share of l1",
    )
    zeros: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of zeros in the hidden state to reach: the weight then starts at l1 and is steered",
    )

    @field_validator("stages")
    @classmethod
    def _one_after_another(cls, stages: Weights) -> Weights:
        ends = [end for end, _ in stages]
        if not ends or ends != sorted(set(ends)) or ends[0] <= 0 or ends[-1] != 1:
            raise ValueError("stages end one after another, the last one at 1")
        if any(not 0 <= weight <= 1e6 for _, weight in stages):
            raise ValueError("weights of stages are numbers from 0 on")
        return stages

    @model_validator(mode="after")
    def _steered_or_staged(self) -> Self:
        if self.zeros is not None:
            for key in ("growth", "stages"):
                if key in self.model_fields_set:
                    raise ValueError(f"with option zeros the weight is steered: leave out option {key}")
        return self


def recipe_names() -> list[str]:
    """All recipes, in the order of their names."""
    return sorted(module.name for module in iter_modules(__path__))


def options_of(recipe: str) -> type[RecipeOptions]:
    """The options of a recipe."""
    found: type[RecipeOptions] = import_module(f"{__name__}.{recipe}").Options
    return found
