"""The command line: `everest COMMAND ...`. Parses, calls a module of `everest_ds.commands`, no logic of its own.

Exit codes: 0 done; 1 a check found a fault (`everest doctor`, `everest plan`) or we failed; 2 a fault of the
user's, with one message and no traceback; 75 a signal stopped a run, all saved, and the same command goes on.
Modules are imported when their command runs.
"""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from everest_ds import __version__
from everest_ds.config import Config
from everest_ds.distributed import World, speaks_first
from everest_ds.errors import UserError, nearest_hint

T = TypeVar("T")

COMMANDS = {
    "doctor": "devices, attention backends, decoders, DeepSpeed, versions; exits 1 when something is missing",
    "demo-data": "a small labelled H.264 dataset with train.csv, val.csv, test.csv",
    "recipes": "the recipes; with a name: resolved config, token counts, batch arithmetic, DeepSpeed JSON",
    "plan": "will a recipe fit N GPUs, what takes the memory, and the command; exits 1 when nothing fits",
    "pretrain": "pre-train a recipe; every config field is a flag",
    "convert": "weights in and out: runs, official .pth files, Hugging Face folders, safetensors",
    "benchmark": "flops: the paper's tables beside our counts",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    world = World.from_environment()
    try:
        return _dispatch(words, world)
    except UserError as error:
        _say(f"everest: error: {error}\n", world)
        return _leave(2)
    except BrokenPipeError:  # the reader of a listing, `head` for instance, has seen enough
        if words[0] == "pretrain":
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _leave(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _say(f"everest: error: {error.strerror}: {error.filename or 'see the run directory'}; make room\n", world)
        return _leave(2)


def _dispatch(words: list[str], world: World) -> int:
    if not words or words[0] in ("-h", "--help"):
        _say(_usage(), world, to_stdout=True)
        return 0
    if words[0] == "--version":
        print(__version__)
        return 0
    command, rest = words[0], words[1:]
    if command.startswith("--local"):
        raise UserError(
            f"got {command} before the sub-command; start with `deepspeed --no_local_rank --module ...`"
        )
    if command not in COMMANDS:
        raise UserError(f"unknown command {command!r}{nearest_hint(command, COMMANDS)}")
    handlers = {
        "doctor": _doctor,
        "demo-data": _demo_data,
        "recipes": _recipes,
        "plan": _plan,
        "pretrain": _pretrain,
        "convert": _convert,
        "benchmark": _benchmark,
    }
    return handlers[command](rest, world)


def _doctor(rest: list[str], world: World) -> int:
    @dataclass(frozen=True)
    class Arguments:
        """Check this machine."""

    _parse(Arguments, rest, "everest doctor", world)
    from everest_ds.commands.doctor import doctor

    return doctor()


def _demo_data(rest: list[str], world: World) -> int:
    from everest_ds.data.demo import DemoConfig

    @dataclass(frozen=True, kw_only=True)
    class Arguments:
        """Make the demo dataset."""

        folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
        """Where to write it."""
        demo: Annotated[DemoConfig, tyro.conf.arg(name="")] = field(default_factory=DemoConfig)

    arguments = _parse(Arguments, rest, "everest demo-data", world)
    from everest_ds.commands.demo_data import demo_data

    demo_data(arguments.folder, arguments.demo)
    return 0


def _recipes(rest: list[str], world: World) -> int:
    from everest_ds.commands.recipes import list_recipes, show_recipe

    if not rest or rest[0].startswith("-"):
        _parse(_NoArguments, rest, "everest recipes [RECIPE]", world)
        list_recipes()
        return 0
    config = _recipe(rest[0])

    @dataclass(frozen=True, kw_only=True)
    class Arguments:
        """Show one recipe as it would run."""

        config: Annotated[Config, tyro.conf.arg(name="")]
        gpus: int = 8
        """Processes to do the batch arithmetic for."""
        ds_config: Path | None = None
        """File of ds_configs/; plain ZeRO-2 without one."""

    arguments = _parse(Arguments, rest[1:], "everest recipes RECIPE", world, config=config)
    if arguments.gpus < 1:
        raise UserError(f"--gpus {arguments.gpus} must be at least 1")
    show_recipe(arguments.config, num_gpus=arguments.gpus, ds_config=arguments.ds_config)
    return 0


def _plan(rest: list[str], world: World) -> int:
    from everest_ds.commands.plan import PlanOptions, plan

    config, flags = _recipe_and_flags("plan", rest)

    @dataclass(frozen=True, kw_only=True)
    class Arguments:
        """Estimate what a recipe takes on some GPUs. Defaults shown are the recipe's."""

        config: Annotated[Config, tyro.conf.arg(name="")]
        options: Annotated[PlanOptions, tyro.conf.arg(name="")]

    required = PlanOptions(gpus=tyro.MISSING, gpu_memory_gib=tyro.MISSING)
    arguments = _parse(Arguments, flags, "everest plan RECIPE", world, config=config, options=required)
    return plan(arguments.config, arguments.options, recipe=rest[0], base=config)


def _pretrain(rest: list[str], world: World) -> int:
    from everest_ds.commands.train import LaunchOptions, pretrain

    config, flags = _recipe_and_flags("pretrain", rest)

    @dataclass(frozen=True, kw_only=True)
    class Arguments:
        """Pre-train a recipe. Defaults shown are the recipe's."""

        config: Annotated[Config, tyro.conf.arg(name="")]
        launch: Annotated[LaunchOptions, tyro.conf.arg(name="")] = field(default_factory=LaunchOptions)

    arguments = _parse(Arguments, flags, "everest pretrain RECIPE", world, config=config)
    code = pretrain(arguments.config, arguments.launch, world)
    return _leave(code, at_once=world.size > 1)


def _convert(rest: list[str], world: World) -> int:
    from everest_ds.commands.convert import Target, convert

    @dataclass(frozen=True, kw_only=True)
    class Arguments:
        """Write weights in another layout, and say what was read and which name became which."""

        source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SRC")]
        """A run directory, for its newest checkpoint; a checkpoint; an official .pth file; a Hugging Face folder; a
        file of this command."""
        target: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]
        """What to write; it must not exist."""
        to: Target
        """everest: a float32 .safetensors file; videomae: a .pth file in the official layout; hf: a Hugging Face
        folder; deepspeed-fp32: everest with a run's step and configuration."""
        allow: tuple[str, ...] = ()
        """Tensors or modules that may be in SRC and are left out."""

    arguments = _parse(Arguments, rest, "everest convert", world)
    convert(arguments.source, arguments.target, arguments.to, arguments.allow)
    return 0


def _benchmark(rest: list[str], world: World) -> int:
    what = rest[0] if rest else ""
    if what in ("-h", "--help"):
        rest = ["flops", what]
    elif what != "flops":
        raise UserError(f"benchmark what? got {what!r}{nearest_hint(what, ['flops'])}")

    @dataclass(frozen=True)
    class Arguments:
        """Count multiply-accumulates by a profiler and print them beside the paper's tables."""

        json: bool = False
        """One JSON line a row instead of a table."""

    arguments = _parse(Arguments, rest[1:], "everest benchmark flops", world)
    from everest_ds.commands.flops import benchmark_flops

    benchmark_flops(as_json=arguments.json)
    return 0


@dataclass(frozen=True)
class _NoArguments:
    """List the recipes; `everest recipes RECIPE --help` has the options for one."""


def _recipe_and_flags(command: str, rest: list[str]) -> tuple[Config, list[str]]:
    """Take the recipe off the words of a command that needs one; help is shown with the demo's defaults."""
    if rest and rest[0] in ("-h", "--help"):
        return _recipe("demo"), rest
    if not rest or rest[0].startswith("-"):
        from everest_ds.recipes import PRETRAIN_RECIPES

        raise UserError(f"{command} needs a recipe first; known: {', '.join(sorted(PRETRAIN_RECIPES))}")
    return _recipe(rest[0]), rest[1:]


def _recipe(name: str) -> Config:
    """Return a recipe by name, or the configuration of a run by the path of its config.json."""
    if name.endswith(".json"):
        from everest_ds.config_file import load_config

        return load_config(Path(name))
    from everest_ds.recipes import get_recipe

    return get_recipe(name)


def _parse(cls: type[T], words: list[str], prog: str, world: World, **defaults: Any) -> T:
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
        _say(captured.getvalue(), world)
        raise SystemExit(_leave(int(stop.code or 0))) from None


def _usage() -> str:
    rows = "\n".join(f"  {name:<10} {what}" for name, what in COMMANDS.items())
    return f"usage: everest COMMAND ...\n\n{rows}\n\n`everest COMMAND --help` shows its options.\n"


def _say(text: str, world: World, *, to_stdout: bool = False) -> None:
    if text and speaks_first(text, world):
        (sys.stdout if to_stdout else sys.stderr).write(text)


def _leave(code: int, *, at_once: bool = False) -> int:
    """Return the exit code, or exit at once where a process group would abort on the way out.

    gloo does so now and then (exit code -6) even after the group was left: one launch in some hundreds.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    torch = sys.modules.get("torch")
    if at_once or (torch is not None and torch.distributed.is_initialized()):
        os._exit(code)
    return code
