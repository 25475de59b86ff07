"""Options of recipe relu."""

from teal_cli.config.recipes import RecipeOptions


class Options(RecipeOptions):
    """relu has none of its own."""
