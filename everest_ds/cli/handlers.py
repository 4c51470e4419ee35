"""One function a command: its words into arguments, its module imported, its exit code returned."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from everest_ds.cli.parsing import leave, parse, recipe_and_flags
from everest_ds.config import TaskName
from everest_ds.distributed import World
from everest_ds.errors import UserError


def doctor(rest: list[str], world: World) -> int:
    """Check this machine."""

    @dataclass(frozen=True)
    class Arguments:
        """Check this machine."""

    parse(Arguments, rest, "everest doctor", world)
    from everest_ds.commands import doctor as command

    return command.doctor()


def recipes(rest: list[str], world: World) -> int:
    """List the recipes, or show one."""
    from everest_ds.commands import recipes as command

    if not rest or rest[0].startswith("-"):
        parse(_NoArguments, rest, "everest recipes [RECIPE]", world)
        command.list_recipes()
        return 0
    from everest_ds.recipes import find_config

    config = find_config(rest[0])
    kind = type(config)

    @dataclass(frozen=True, kw_only=True)
    class Arguments:
        """Show one recipe as it would run."""

        config: Annotated[kind, tyro.conf.arg(name="")]  # type: ignore[valid-type]
        gpus: int = 8
        """Processes to do the batch arithmetic for."""
        ds_config: Path | None = None
        """File of ds_configs/; plain ZeRO-2 without one."""

    arguments = parse(Arguments, rest[1:], "everest recipes RECIPE", world, config=config)
    if arguments.gpus < 1:
        raise UserError(f"--gpus {arguments.gpus} must be at least 1")
    command.show_recipe(arguments.config, num_gpus=arguments.gpus, ds_config=arguments.ds_config)
    return 0


def plan(rest: list[str], world: World) -> int:
    """Estimate memory."""
    from everest_ds.commands import plan as command

    config, flags = recipe_and_flags("plan", rest)
    kind = type(config)

    @dataclass(frozen=True, kw_only=True)
    class Arguments:
        """Estimate what a recipe takes on some GPUs. Defaults shown are the recipe's."""

        config: Annotated[kind, tyro.conf.arg(name="")]  # type: ignore[valid-type]
        options: Annotated[command.PlanOptions, tyro.conf.arg(name="")]

    required = command.PlanOptions(gpus=tyro.MISSING, gpu_memory_gib=tyro.MISSING)
    arguments = parse(Arguments, flags, "everest plan RECIPE", world, config=config, options=required)
    return command.plan(arguments.config, arguments.options, recipe=rest[0], base=config)


def pretrain(rest: list[str], world: World) -> int:
    """Pre-train a recipe."""
    return _train("pretrain", rest, world)


def finetune(rest: list[str], world: World) -> int:
    """Fine-tune a recipe on labelled videos."""
    return _train("finetune", rest, world)


def _train(task: TaskName, rest: list[str], world: World) -> int:
    from everest_ds.commands import train as command
    from everest_ds.commands.train import LaunchOptions as Launch

    config, flags = recipe_and_flags(task, rest, task)
    kind = type(config)

    @dataclass(frozen=True, kw_only=True)
    class Arguments:
        """Train a recipe. Defaults shown are the recipe's."""

        config: Annotated[kind, tyro.conf.arg(name="")]  # type: ignore[valid-type]
        launch: Annotated[Launch, tyro.conf.arg(name="")] = field(default_factory=Launch)

    arguments = parse(Arguments, flags, f"everest {task} RECIPE", world, config=config)
    code = command.train(arguments.config, arguments.launch, world)
    return leave(code, at_once=world.size > 1 or code != 0)  # whoever stops a run waits for its end


def evaluate(rest: list[str], world: World) -> int:
    """Score a model."""
    from everest_ds.commands import evaluate as command

    @dataclass(frozen=True, kw_only=True)
    class Arguments:
        """Score a trained model over a list of videos, softmax averaged over several views of each.

        Writes summary.json, predictions.csv and confusion.png.
        """

        source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
        """A run directory, for its best checkpoint where it has one, else its newest; a checkpoint; or weights with
        a classification head in any layout, which need --recipe."""
        options: Annotated[command.EvaluateOptions, tyro.conf.arg(name="")] = field(
            default_factory=command.EvaluateOptions
        )

    arguments = parse(Arguments, rest, "everest evaluate", world)
    code = command.evaluate(arguments.source, arguments.options, world)
    return leave(code, at_once=world.size > 1)


def predict(rest: list[str], world: World) -> int:
    """Say what is in new videos."""
    from everest_ds.commands import predict as command

    @dataclass(frozen=True, kw_only=True)
    class Arguments:
        """Print the likeliest classes of new videos, or write their features."""

        source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CKPT")]
        """A run directory, a checkpoint, or weights in any layout, which need --recipe."""
        videos: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="VIDEO...")]
        """Video files, and folders that are searched for them; none are needed with --list."""
        options: Annotated[command.PredictOptions, tyro.conf.arg(name="")] = field(
            default_factory=command.PredictOptions
        )

    arguments = parse(Arguments, rest, "everest predict", world)
    code = command.predict(arguments.source, arguments.videos, arguments.options, world)
    return leave(code, at_once=world.size > 1)


def convert(rest: list[str], world: World) -> int:
    """Convert weights."""
    from everest_ds.commands import convert as command

    @dataclass(frozen=True, kw_only=True)
    class Arguments:
        """Write weights in another layout, and say what was read and which name became which."""

        source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SRC")]
        """A run directory, for its best checkpoint or else its newest; a checkpoint; an official .pth file; a
        Hugging Face folder; a file of this command."""
        target: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]
        """What to write; it must not exist."""
        options: Annotated[command.ConvertOptions, tyro.conf.arg(name="")]

    arguments = parse(Arguments, rest, "everest convert", world)
    command.convert(arguments.source, arguments.target, arguments.options)
    return 0


def study(rest: list[str], world: World) -> int:
    """Run the study in miniature."""
    from everest_ds import study as command

    @dataclass(frozen=True, kw_only=True)
    class Arguments:
        """Compare selections, ratios, distances and budgets on demo data, over seeds; go on where it was."""

        folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
        """Where videos, runs and results go."""
        options: Annotated[command.StudyOptions, tyro.conf.arg(name="")] = field(
            default_factory=command.StudyOptions
        )

    if world.size > 1:
        raise UserError("everest study starts its runs itself; start it without a launcher")
    arguments = parse(Arguments, rest, "everest study", world)
    return command.study(arguments.folder, arguments.options)


@dataclass(frozen=True)
class _NoArguments:
    """List the recipes; `everest recipes RECIPE --help` has the options for one."""
