"""The table of commands. A new command is one entry here and one module in `everest_ds.commands`.

A command has one or two parts, each MODULE:FUNCTION. Its `entry` takes the words after the command and the `World`,
parses them into the module's `Arguments`, and refuses what can be refused without torch. It returns the exit code,
or a job. A job goes to the command's `work` in another room, which may import torch at its top: it takes the job
and the `World`, and returns the exit code. Both modules are imported when the command runs: here, and nowhere else.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

EXIT_INTERRUPTED = 130
"""128 and the number of SIGINT, as shells have it."""

_CONTINUES = "interrupted; the same command continues where it stopped"
_STARTS_AGAIN = "interrupted; the same command starts again"
_NOT_TRAINED = "interrupted before the first step, nothing was trained; the same command starts again"


class Command(NamedTuple):  # no dataclass: that takes longer to import than all else before Ctrl-C is answered
    """One command.

    Attributes:
        purpose: What it is for, in the usage.
        entry: MODULE:FUNCTION that parses and checks; MODULE is below `everest_ds.commands`.
        work: MODULE:FUNCTION that does what the entry returned; MODULE is below `everest_ds`.
        on_interrupt: Message when Ctrl-C ends it; a training that has begun has its own.
        keeps_logs: Whether it has a run directory, for what libraries print; people do not see that.
        parts: Commands of its own, by the word after its name, in place of an entry.
    """

    purpose: str
    entry: str = ""
    work: str | None = None
    on_interrupt: str = _STARTS_AGAIN
    keeps_logs: bool = False
    parts: Mapping[str, "Command"] = {}

    def load_entry(self) -> Callable[..., Any]:
        """Import the module that parses and checks."""
        return _load(f"everest_ds.commands.{self.entry}")

    def load_work(self) -> Callable[..., int]:
        """Import the module that does the work."""
        return _load(f"everest_ds.{self.work}")


def _load(name: str) -> Any:
    module, function = name.split(":")
    return getattr(importlib.import_module(module), function)


_BENCHMARKS = {
    "flops": Command(
        purpose="the paper's tables of costs beside our counts",
        entry="benchmark:flops",
        work="benchmark.flops:run",
    ),
    "data": Command(
        purpose="what a recipe's clips cost by phase, and how many GPUs this machine's loader feeds",
        entry="benchmark:data",
        work="benchmark.data:run",
    ),
    "step": Command(
        purpose="speed, memory and utilisation of a training step; beside the official code; which ZeRO stage wins",
        entry="benchmark:step",
        work="benchmark.steps.step:run",
    ),
}

COMMANDS = {
    "doctor": Command(
        purpose="devices, attention backends, decoders, DeepSpeed, versions; exits 1 when something is missing",
        entry="doctor:main",
    ),
    "demo-data": Command(
        purpose="a small labelled H.264 dataset with train.csv, val.csv, test.csv",
        entry="data.demo_data:main",
        on_interrupt=_CONTINUES,
    ),
    "index": Command(
        purpose="a public dataset's own layout and split files into train, val and test lists",
        entry="data.index:main",
    ),
    "check-data": Command(
        purpose="which videos of a list cannot be read, hang, are cut off; exits 1 when too many are bad",
        entry="data.check_data:main",
        on_interrupt=_CONTINUES,
    ),
    "prepare": Command(
        purpose="re-encode the videos of lists so that they are quick to read; exits 1 when too many fail",
        entry="data.prepare:main",
        work="data.curation.reencode:run",
        on_interrupt=_CONTINUES,
    ),
    "recipes": Command(
        purpose="the recipes; with a name: resolved config, token counts, batch arithmetic, DeepSpeed JSON",
        entry="recipes:main",
        work="planning.recipe:run",
    ),
    "plan": Command(
        purpose="will a recipe fit N GPUs, what takes the memory, and the command; exits 1 when nothing fits",
        entry="plan:main",
        work="planning.report:run",
    ),
    "pretrain": Command(
        purpose="pre-train a recipe; every config field is a flag",
        entry="train:pretrain",
        work="training_run.run:run",
        on_interrupt=_NOT_TRAINED,
        keeps_logs=True,
    ),
    "finetune": Command(
        purpose="fine-tune a recipe on labelled videos, scoring it on the way",
        entry="train:finetune",
        work="training_run.run:run",
        on_interrupt=_NOT_TRAINED,
        keeps_logs=True,
    ),
    "evaluate": Command(
        purpose="score a run, a checkpoint or weights over a list, several views a video",
        entry="weights.evaluate:main",
        work="inference.evaluation:run",
    ),
    "predict": Command(
        purpose="labels or features of new videos, files or folders",
        entry="weights.predict:main",
        work="inference.prediction:run",
    ),
    "show": Command(
        purpose="pictures of videos: importance, kept tokens, chosen frames, reconstruction",
        entry="weights.show:main",
        work="inference.showing:run",
    ),
    "convert": Command(
        purpose="weights in and out: runs, official .pth files, Hugging Face folders, safetensors",
        entry="weights.convert:main",
        work="inference.conversion:run",
    ),
    "study": Command(
        purpose="the paper's comparisons in miniature, on demo data; exits 1 when a run failed",
        entry="study:main",
        work="study.runs:run",
        on_interrupt="interrupted, its runs are stopped; the same command continues where it stopped",
    ),
    "benchmark": Command(
        purpose="flops: the paper's costs beside ours; data: what clips cost; step: speed, memory, MFU",
        parts=_BENCHMARKS,
    ),
}
"""The commands by name."""


def interrupted(words: Sequence[str]) -> str:
    """Return the message for Ctrl-C."""
    command = COMMANDS.get(words[0]) if words else None
    text = command.on_interrupt if command else "interrupted"
    return f"everest: {text} (exit code {EXIT_INTERRUPTED})"
