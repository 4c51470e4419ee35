"""A summary of a finished run in a few lines, from its record."""

import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from everest_ds.config import Config
from everest_ds.files import sort_json_lines
from everest_ds.progress import format_duration
from everest_ds.train.record.lines import read_measurements
from everest_ds.train.schedule import Schedule


def describe_run(run_dir: Path, config: Config, seconds: float) -> str:
    """Return the summary of a run from its files; see `describe_end`."""
    num_bad = len(sort_json_lines(run_dir / "bad_samples.jsonl", lambda line: "path" in line)[0])
    return describe_end(run_dir, config, read_measurements(run_dir), seconds=seconds, num_bad=num_bad)


def describe_end(
    run_dir: Path, config: Config, lines: Sequence[Mapping[str, Any]], *, seconds: float, num_bad: int
) -> str:
    """Return the directory, results and next command of a finished run.

    Args:
        run_dir: The run directory.
        config: The run.
        lines: The lines of metrics.jsonl, in order.
        seconds: Duration of this launch.
        num_bad: Draws that could not be read.
    """
    rows = {"took": f"{format_duration(seconds)} since this start"}
    train = [line for line in lines if line["kind"] == "train"]
    if train:
        rows |= _describe_training(train)
    scored = [line for line in lines if line["kind"] == "val"]
    if scored:
        best = max(scored, key=lambda line: line["top1"])
        rows["top-1"] = f"{best['top1']:.2%} at step {best['step']} (best), {scored[-1]['top1']:.2%} at the end"
    memory = next((line for line in reversed(lines) if line.get("event") == "memory"), None)
    if memory is not None:
        what = "allocated" if memory["device"] == "cuda" else "resident, with Python and its libraries"
        peak, planned = memory["peak_gib"], memory["estimated_gib"]
        rows["memory"] = f"{peak:.2f} GiB {what}; {planned:.2f} GiB planned for tensors"
    bad = f"{num_bad} draws unreadable: {run_dir / 'bad_samples.jsonl'}" if num_bad else "all readable"
    rows |= {"videos": bad, "next": _next_command(run_dir, config)}
    return "\n".join([f"done: {run_dir}", *(f"  {name:<7} {text}" for name, text in rows.items())])


def describe_nothing_left(run_dir: Path, schedule: Schedule, max_steps: int | None) -> str:
    """Return why a launch took no step, and how to train the run longer."""
    longer = "raise --run.max-steps, or " if max_steps is not None and schedule.end_step == max_steps else ""
    return (
        f"nothing left to do: step {schedule.start_step} of {schedule.end_step}; to train longer, {longer}"
        f"start a new run from these weights: --init-from {shlex.quote(str(run_dir))} --out ANOTHER"
    )


def _describe_training(train: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return loss and speed from the lines of training."""
    first, last = train[0], train[-1]
    speed = statistics.median(line["clips_per_s"] for line in train)
    waited = statistics.median(line.get("stalled", 0.0) for line in train)
    used = [line["mfu"] for line in train if line.get("mfu") is not None]
    mfu = f", MFU {statistics.median(used):.1%}" if used else ""
    losses = [line["loss"] for line in train if line["loss"] is not None]
    lowest = f", lowest {min(losses):.4f}" if losses else ""
    began, ended = (f"{_number(line['loss'])} at step {line['step']}" for line in (first, last))
    return {
        "loss": f"{began}, {ended}{lowest}",
        "speed": f"{speed:.1f} clips/s in the median, {waited:.0%} of the time waiting for clips{mfu}",
    }


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _next_command(run_dir: Path, config: Config) -> str:
    """Return the command that most users need next."""
    run = shlex.quote(str(run_dir))
    if config.task == "finetune":
        return f"everest evaluate {run} --list TEST_LIST"
    return f"everest finetune {config.recipe}_ft --init-from {run} --data.train-list LIST --data.val-list LIST"
