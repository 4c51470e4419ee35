"""The table of commands. A new command is one entry here and one module in `everest_ds.commands`.

A command has one or two functions, each named as MODULE:FUNCTION. Its `entry` gets the words after the command and
the `World`, parses them into the module's `Arguments`, and does all checks that need no torch. It returns the exit
code or a job. The command's `work` is in another package and may import torch at its top. It gets the job and the
`World`, and returns the exit code. Both modules are imported when the command runs, and only here.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

EXIT_INTERRUPTED = 130
"""128 plus the number of SIGINT, as in shells."""

_CONTINUES = "interrupted; the same command continues where it stopped"
_STARTS_AGAIN = "interrupted; the same command starts again"
_NOT_TRAINED = "interrupted before the first step, nothing was trained; the same command starts again"


class Command(NamedTuple):  # not a dataclass: importing dataclasses takes too long before Ctrl-C is handled
    """One command.

    Attributes:
        purpose: Its line in the usage.
        entry: MODULE:FUNCTION that parses and checks; MODULE is below `everest_ds.commands`.
        work: MODULE:FUNCTION that does the job; MODULE is below `everest_ds`.
        on_interrupt: Message if Ctrl-C ends it; a training that has begun has its own message.
        keeps_logs: Whether output of libraries goes into the run directory instead of the terminal.
        parts: Sub-commands by name, instead of an entry.
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
        purpose="the paper's costs compared with our counts",
        entry="benchmark:flops",
        work="benchmark.flops:run",
    ),
    "data": Command(
        purpose="cost of a recipe's clips by phase, and how many GPUs this machine's loader can feed",
        entry="benchmark:data",
        work="benchmark.data:run",
    ),
    "step": Command(
        purpose="speed, memory and utilisation of a training step; comparison with the official code; ZeRO stages",
        entry="benchmark:step",
        work="benchmark.steps.step:run",
    ),
}

COMMANDS = {
    "doctor": Command(
        purpose="check devices, attention backends, decoders, DeepSpeed, versions; exits 1 if something is missing",
        entry="doctor:main",
    ),
    "demo-data": Command(
        purpose="make a small labelled H.264 dataset with train.csv, val.csv, test.csv",
        entry="data.demo_data:main",
        on_interrupt=_CONTINUES,
    ),
    "index": Command(
        purpose="make train, val and test lists from a public dataset's own layout and split files",
        entry="data.index:main",
    ),
    "check-data": Command(
        purpose="find videos of a list that are unreadable, hang or are cut off; exits 1 if too many are bad",
        entry="data.check_data:main",
        on_interrupt=_CONTINUES,
    ),
    "prepare": Command(
        purpose="re-encode the videos of lists so that they are quick to read; exits 1 if too many fail",
        entry="data.prepare:main",
        work="data.curation.reencode:run",
        on_interrupt=_CONTINUES,
    ),
    "recipes": Command(
        purpose="list recipes; with a name: resolved config, token counts, batch arithmetic, DeepSpeed JSON",
        entry="recipes:main",
        work="planning.recipe:run",
    ),
    "plan": Command(
        purpose="whether a recipe fits N GPUs, its memory, and the command to run; exits 1 if nothing fits",
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
        purpose="fine-tune a recipe on labelled videos, with scores during training",
        entry="train:finetune",
        work="training_run.run:run",
        on_interrupt=_NOT_TRAINED,
        keeps_logs=True,
    ),
    "evaluate": Command(
        purpose="score a run, a checkpoint or weights on a list, with several views of each video",
        entry="weights.evaluate:main",
        work="inference.evaluation:run",
    ),
    "predict": Command(
        purpose="print labels or write features of new videos, files or folders",
        entry="weights.predict:main",
        work="inference.prediction:run",
    ),
    "show": Command(
        purpose="draw videos: importance, kept tokens, selected frames, reconstruction",
        entry="weights.show:main",
        work="inference.showing:run",
    ),
    "report": Command(
        purpose="one page about runs: curves, settings, pictures, speed, scores, what went wrong",
        entry="report:main",
    ),
    "convert": Command(
        purpose="convert weights: runs, official .pth files, Hugging Face folders, safetensors",
        entry="weights.convert:main",
        work="inference.conversion:run",
    ),
    "study": Command(
        purpose="run the paper's comparisons in miniature, on demo data; exits 1 if a run failed",
        entry="study:main",
        work="study.runs:run",
        on_interrupt="interrupted, its runs are stopped; the same command continues where it stopped",
    ),
    "benchmark": Command(
        purpose="measure; flops: the paper's costs and ours; data: cost of clips; step: speed, memory, MFU",
        parts=_BENCHMARKS,
    ),
}
"""The commands by name."""


def interrupted(words: Sequence[str]) -> str:
    """Return the message for Ctrl-C."""
    command = COMMANDS.get(words[0]) if words else None
    text = command.on_interrupt if command else "interrupted"
    return f"everest: {text} (exit code {EXIT_INTERRUPTED})"
