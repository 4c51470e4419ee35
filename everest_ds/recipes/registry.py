"""Recipes by name. Names are unique over both tasks, so a name also identifies the task."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from everest_ds.config import Config, TaskName
from everest_ds.config.file import load_config
from everest_ds.errors import UserError, nearest_hint

Recipe = Callable[[], Config]
RECIPES: dict[str, Recipe] = {}

R = TypeVar("R", bound=Recipe)


def register(recipe: R) -> R:
    """Register a function as a recipe under its own name; for use as a decorator."""
    RECIPES[recipe.__name__] = recipe
    return recipe


def get_recipe(name: str) -> Config:
    """Return the configuration of a named recipe.

    Raises:
        UserError: There is no such recipe; the message gives the nearest name.
    """
    if name not in RECIPES:
        raise UserError(f"unknown recipe {name!r}{nearest_hint(name, RECIPES)}")
    return RECIPES[name]()


def find_config(name: str) -> Config:
    """Return a recipe by name, or the configuration of a run by the path of its config.json.

    Raises:
        UserError: There is no such recipe, or the file is not a run's config.json.
    """
    return load_config(Path(name)) if name.endswith(".json") else get_recipe(name)


def recipes_of(task: TaskName) -> list[str]:
    """Return the names of a task's recipes."""
    return [name for name, recipe in RECIPES.items() if recipe().task == task]
