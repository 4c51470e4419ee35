"""What the runs of a study say: how well they did, and what they cost."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from everest_ds.config import PretrainConfig
from everest_ds.config.file import load_config
from everest_ds.inference.results import SUMMARY
from everest_ds.study.conditions import Condition
from everest_ds.study.jobs import Job, read_metrics


@dataclass(frozen=True, kw_only=True)
class Result:
    """One condition at one seed.

    Attributes:
        condition: Its name.
        seed: Its seed.
        probe_top1: Share of test videos that a linear probe of the pre-trained features gets right.
        finetune_top1: Share that the fine-tuned model gets right.
        visible_tokens: Tokens of a pre-training clip that the encoder sees.
        pretrain_gmacs: Multiply-accumulates of a pre-training clip, forward and backward, in units of 1e9.
        finetune_gmacs: Those of a fine-tuning clip.
        pretrain_s: Seconds of pre-training's steps.
        finetune_s: Seconds of fine-tuning's steps.
        commands: How to run it again.
    """

    condition: str
    seed: int
    probe_top1: float
    finetune_top1: float
    visible_tokens: int
    pretrain_gmacs: float
    finetune_gmacs: float
    pretrain_s: float
    finetune_s: float
    commands: tuple[str, ...]


def describe(job: Job) -> str:
    """Return the outcome of a finished job in a few words."""
    if job.kind == "pretrain":
        return f"loss {read_metrics(job.out, 'train')[-1]['loss']:.4f}"
    return f"top-1 {_top1(job.out):.1%}"


def read_result(folder: Path, condition: Condition, seed: int, jobs: Sequence[Job]) -> Result | None:
    """Return what came out of a condition at a seed; None where one of its runs is not complete."""
    names = {"pretrain": condition.pretraining, "probe": condition.pretraining, "finetune": condition.name}
    parts = {job.kind: job for job in jobs if job.name == f"{names[job.kind]}-{seed}"}
    if not all(job.is_done() for job in parts.values()):
        return None
    pretrain, finetune = parts["pretrain"].out, parts["finetune"].out
    config = load_config(pretrain / "config.json")
    assert isinstance(config, PretrainConfig)
    return Result(
        condition=condition.name,
        seed=seed,
        probe_top1=_top1(parts["probe"].out),
        finetune_top1=_top1(finetune),
        visible_tokens=config.num_visible,
        pretrain_gmacs=clip_gmacs(pretrain),
        finetune_gmacs=clip_gmacs(finetune),
        pretrain_s=seconds_of_steps(read_metrics(pretrain, "train")),
        finetune_s=seconds_of_steps(read_metrics(finetune, "train")),
        commands=tuple(job.command for job in parts.values()),
    )


def seconds_of_steps(lines: Sequence[dict[str, Any]]) -> float:
    """Return how long a run's steps took, from its train lines: each has the mean step since the one before."""
    steps = [0, *(line["step"] for line in lines)]
    return sum(
        line["step_ms"] * (step - before) / 1e3
        for line, step, before in zip(lines, steps[1:], steps[:-1], strict=True)
    )


@lru_cache
def clip_gmacs(run_dir: Path) -> float:
    """Return the GMACs of one clip of a run, forward and backward."""
    from everest_ds.train.tasks import make_task

    return make_task(load_config(run_dir / "config.json")).clip_flops() / 2e9


def _top1(out: Path) -> float:
    if (out / SUMMARY).is_file():
        return float(json.loads((out / SUMMARY).read_text())["top1"])
    return float(read_metrics(out, "val")[-1]["top1"])
