"""The recipes: one file each, with a class `RECIPE`. The file of the same name in `config/recipes` has its options."""

from importlib import import_module

from teal_cli.adapt.recipe import Recipe


def recipe_class(name: str) -> type[Recipe]:
    """The recipe of a name that the configuration let through."""
    found: type[Recipe] = import_module(f"{__name__}.{name}").RECIPE
    return found
