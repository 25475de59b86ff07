"""The options that each recipe of `teal adapt` has of its own: one module each, named as the recipe, with `Options`.

A recipe is here by having a module in this package; its code is the module of the same name in `adapt/recipes`.
"""

from importlib import import_module
from pkgutil import iter_modules

from pydantic import BaseModel, ConfigDict


class RecipeOptions(BaseModel):
    """Options of one recipe. Keys of YAML's `options`, or of the flag `--options KEY=VALUE,KEY=VALUE`."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def recipe_names() -> list[str]:
    """All recipes, in the order of their names."""
    return sorted(module.name for module in iter_modules(__path__))


def options_of(recipe: str) -> type[RecipeOptions]:
    """The options of a recipe."""
    found: type[RecipeOptions] = import_module(f"{__name__}.{recipe}").Options
    return found
