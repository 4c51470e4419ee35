"""`everest benchmark ...`, one function each, as in `cli.handlers`."""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from everest_ds.cli.parsing import leave, parse, recipe_and_flags, say
from everest_ds.distributed import World
from everest_ds.errors import UserError, nearest_hint

BENCHMARKS = {
    "flops": "the paper's tables of costs beside our counts",
    "data": "what a recipe's clips cost by stage, and how many GPUs this machine's loader feeds",
    "step": "speed, memory and utilisation of a training step; beside the official code; which ZeRO stage wins",
}


def benchmark(rest: list[str], world: World) -> int:
    """Run a benchmark."""
    what = rest[0] if rest else ""
    if what in ("-h", "--help"):
        rows = "\n".join(f"  {name:<6} {shows}" for name, shows in BENCHMARKS.items())
        usage = (
            f"usage: everest benchmark NAME ...\n\n{rows}\n\n`everest benchmark NAME --help` shows its options.\n"
        )
        say(usage, world, to_stdout=True)
        return 0
    if what not in BENCHMARKS:
        raise UserError(f"benchmark what? got {what!r}{nearest_hint(what, BENCHMARKS)}")
    run = {
        "flops": _flops,
        "data": _data,
        "step": _step,
    }
    return run[what](rest[1:], world)


def _flops(rest: list[str], world: World) -> int:
    @dataclass(frozen=True)
    class Arguments:
        """Count multiply-accumulates by a profiler and print them beside the paper's tables."""

        json: bool = False
        """One JSON line a row instead of a table."""

    arguments = parse(Arguments, rest, "everest benchmark flops", world)
    from everest_ds.benchmark.flops import benchmark_flops

    benchmark_flops(as_json=arguments.json)
    return 0


def _data(rest: list[str], world: World) -> int:
    from everest_ds.benchmark import data as command

    if world.size > 1:
        raise UserError("everest benchmark data starts loader processes of its own; start it without a launcher")
    config, flags = recipe_and_flags("benchmark data", rest)
    kind = type(config)

    @dataclass(frozen=True, kw_only=True)
    class Arguments:
        """Measure what the clips of a recipe cost on this machine. Defaults shown are the recipe's."""

        config: Annotated[kind, tyro.conf.arg(name="")]  # type: ignore[valid-type]
        options: Annotated[command.DataBenchmarkOptions, tyro.conf.arg(name="")] = field(
            default_factory=command.DataBenchmarkOptions
        )

    arguments = parse(Arguments, flags, "everest benchmark data RECIPE", world, config=config)
    command.benchmark_data(arguments.config, arguments.options)
    return 0


def _step(rest: list[str], world: World) -> int:
    from everest_ds.benchmark.step import benchmark_step
    from everest_ds.benchmark.step_options import StepOptions

    config, flags = recipe_and_flags("benchmark step", rest)
    kind = type(config)

    @dataclass(frozen=True, kw_only=True)
    class Arguments:
        """Measure training steps of a recipe on clips that need no reading. Defaults shown are the recipe's."""

        config: Annotated[kind, tyro.conf.arg(name="")]  # type: ignore[valid-type]
        options: Annotated[StepOptions, tyro.conf.arg(name="")] = field(default_factory=StepOptions)

    arguments = parse(Arguments, flags, "everest benchmark step RECIPE", world, config=config)
    code = benchmark_step(arguments.config, arguments.options, world)
    return leave(code, at_once=world.size > 1)
