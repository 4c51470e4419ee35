"""Recipes by name. The names of both tasks are apart, so that one name says what is trained."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from everest_ds.config import Config, TaskName
from everest_ds.config.file import load_config
from everest_ds.errors import UserError, nearest_hint

Recipe = Callable[[], Config]
RECIPES: dict[str, Recipe] = {}
_task_of: dict[str, TaskName] = {}

C = TypeVar("C", bound=Config)


def register(task: TaskName) -> Callable[[Callable[[], C]], Callable[[], C]]:
    """Return a decorator that makes a function a recipe under its own name."""

    def add(recipe: Callable[[], C]) -> Callable[[], C]:
        RECIPES[recipe.__name__] = recipe
        _task_of[recipe.__name__] = task
        return recipe

    return add


def get_recipe(name: str) -> Config:
    """Return the configuration of a named recipe.

    Raises:
        UserError: There is no such recipe; the nearest name is given.
    """
    if name not in RECIPES:
        raise UserError(f"unknown recipe {name!r}{nearest_hint(name, RECIPES)}")
    return RECIPES[name]()


def find_config(name: str) -> Config:
    """Return a recipe by name, or the configuration of a run by the path of its config.json.

    Raises:
        UserError: There is no such recipe, or the file is none of ours.
    """
    return load_config(Path(name)) if name.endswith(".json") else get_recipe(name)


def recipes_of(task: TaskName) -> list[str]:
    """Return the names of a task's recipes."""
    return [name for name in RECIPES if _task_of[name] == task]
