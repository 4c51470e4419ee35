"""Flags into dataclasses, recipes by name, and one voice for many processes."""

import contextlib
import io
import os
import sys
from typing import Any, TypeVar

import tyro

from everest_ds.config import Config, TaskName
from everest_ds.distributed import World, speaks_first
from everest_ds.errors import UserError

T = TypeVar("T")


def recipe_and_flags(command: str, rest: list[str], task: TaskName | None = None) -> tuple[Config, list[str]]:
    """Take the recipe off the words of a command that needs one; help is shown with the demo's defaults.

    Raises:
        UserError: There is no recipe, or one of another task than the command's.
    """
    from everest_ds.recipes import RECIPES, find_config, recipes_of

    if rest and rest[0] in ("-h", "--help"):
        return find_config("demo_ft" if task == "finetune" else "demo"), rest
    if not rest or rest[0].startswith("-"):
        known = sorted(recipes_of(task) if task else RECIPES)
        raise UserError(f"{command} needs a recipe first; known: {', '.join(known)}")
    config = find_config(rest[0])
    if task and config.task != task:
        other = f"{rest[0]}_ft" if task == "finetune" else rest[0].removesuffix("_ft")
        hint = f"; did you mean {other!r}?" if other in recipes_of(task) else ""
        raise UserError(f"{rest[0]} is a recipe for `everest {config.task}`, not for `everest {task}`{hint}")
    return config, rest[1:]


def parse(cls: type[T], words: list[str], prog: str, world: World, **defaults: Any) -> T:
    """Parse flags; a parser's complaint of many processes is said once."""
    captured = io.StringIO()
    quiet = contextlib.ExitStack()
    if world.size > 1:
        quiet.enter_context(contextlib.redirect_stdout(captured))
        quiet.enter_context(contextlib.redirect_stderr(captured))
    try:
        with quiet:
            if not defaults:
                return tyro.cli(cls, args=words, prog=prog)
            return tyro.cli(cls, args=words, prog=prog, default=cls(**defaults))
    except SystemExit as stop:
        say(captured.getvalue(), world)
        raise SystemExit(leave(int(stop.code or 0))) from None


def say(text: str, world: World, *, to_stdout: bool = False) -> None:
    """Write a text once for all processes of a launch."""
    if text and speaks_first(text, world):
        (sys.stdout if to_stdout else sys.stderr).write(text)


def leave(code: int, *, at_once: bool = False) -> int:
    """Return the exit code, or exit at once where a process group would abort on the way out.

    gloo does so now and then (exit code -6) even after the group was left: one launch in some hundreds.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    torch = sys.modules.get("torch")
    if at_once or (torch is not None and torch.distributed.is_initialized()):
        os._exit(code)
    return code
