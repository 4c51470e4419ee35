"""Parses the words of a command line into the `Arguments` of a command, and prints texts once for a launch."""

import contextlib
import inspect
import io
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar

import tyro

from everest_ds.config import Config, TaskName
from everest_ds.console.messages import VERBOSITY
from everest_ds.distributed import World, speaks_first
from everest_ds.errors import UserError
from everest_ds.recipes import RECIPES, find_config, recipes_of

T = TypeVar("T")
C = TypeVar("C", bound=Config)


@dataclass(frozen=True, kw_only=True)
class RecipeArguments(Generic[C]):
    """A recipe with a flag for every field; commands add their options."""

    recipe: Annotated[str, tyro.conf.Suppress]
    """Name of the recipe, or path of a run's config.json, as given."""
    config: Annotated[C, tyro.conf.arg(name="")]
    """The configuration, with the flags of the command line."""


R = TypeVar("R", bound=RecipeArguments[Any])


def parse(cls: type[T], words: list[str], prog: str, world: World, *, default: Any = None) -> T:
    """Parse flags into a dataclass. The parser's message is printed once for all processes.

    Raises:
        SystemExit: The flags are wrong, or help was asked for; the message was printed.
    """
    captured = io.StringIO()
    quiet = contextlib.ExitStack()
    if world.size > 1:
        quiet.enter_context(contextlib.redirect_stdout(captured))
        quiet.enter_context(contextlib.redirect_stderr(captured))
    try:
        with quiet:
            about = f"{inspect.cleandoc(getattr(cls, '__origin__', cls).__doc__ or '')}\n\n{VERBOSITY}"
            given = {} if default is None else {"default": default}
            return tyro.cli(cls, args=words, prog=prog, description=about, **given)
    except SystemExit:
        say(captured.getvalue(), world)
        raise


def parse_recipe(
    cls: type[R], words: list[str], prog: str, world: World, *, task: TaskName | None = None, **defaults: Any
) -> R:
    """Parse the first word as the recipe, and the others as its fields and the command's options.

    Args:
        cls: The command's arguments.
        words: RECIPE and flags. Help without a recipe is shown with the demo's defaults.
        prog: Name of the command, in help and messages.
        world: The ranks.
        task: Task of the recipe, if the command needs a certain one.
        defaults: Values of the command's options; `tyro.MISSING` makes a flag required.

    Raises:
        UserError: There is no recipe, or it is of another task.
    """
    if words and words[0] in ("-h", "--help", "--tyro-print-completion"):
        recipe, flags = "demo_ft" if task == "finetune" else "demo", words
    elif not words or words[0].startswith("-"):
        known = ", ".join(known_recipes(task))
        raise UserError(f"{prog.removeprefix('everest ')} needs a recipe first; known: {known}")
    else:
        recipe, *flags = words
    config = find_config(recipe)
    if task and config.task != task:
        other = f"{recipe}_ft" if task == "finetune" else recipe.removesuffix("_ft")
        hint = f"; did you mean {other!r}?" if other in recipes_of(task) else ""
        raise UserError(f"{recipe} is a recipe for `everest {config.task}`, not for `everest {task}`{hint}")
    default = cls(recipe=recipe, config=config, **defaults)
    return parse(cls[type(config)], flags, f"{prog} RECIPE", world, default=default)  # type: ignore[index]


def known_recipes(task: TaskName | None) -> list[str]:
    """Return the names of the recipes of a task, or of all."""
    return sorted(recipes_of(task) if task else RECIPES)


def usage(prog: str, rest: str, choices: Mapping[str, str]) -> str:
    """Return the help of a command with several choices: its usage line, and the purpose of each choice."""
    width = max(len(name) for name in choices)
    rows = "\n".join(f"  {name:<{width}} {text}" for name, text in choices.items())
    return f"usage: {prog} {rest}\n\n{rows}\n\n`{prog} --help` shows its options. {VERBOSITY}\n"


def say(text: str, world: World, *, to_stdout: bool = False) -> None:
    """Print a text once for all processes of a launch."""
    if text and speaks_first(text, world):
        (sys.stdout if to_stdout else sys.stderr).write(text)
