"""Named recipes: each function returns the complete configuration of one run of the paper."""

from everest_ds.recipes import finetune, pretrain, study  # noqa: F401  # they register themselves
from everest_ds.recipes.registry import RECIPES, Recipe, find_config, get_recipe, recipes_of

__all__ = ["RECIPES", "Recipe", "find_config", "get_recipe", "recipes_of"]
