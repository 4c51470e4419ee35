"""What `everest study` does: which runs there are, in which order, and what becomes of them.

DIR/data/             the videos: the class is what moves, on a cluttered background
    labelled-0.csv    the few labelled videos of a seed
    study.json        what was asked for; another study needs another folder
    commands.sh       every command, to run one by hand
    runs/NAME-SEED/   pretrain, probe, finetune: run directories, with their commands and logs
    results.jsonl     one line a condition and seed
    table.md, *.svg   what came out, by table of the paper
"""

import json
import os
import random
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import torch

from everest_ds.data.demo import TEXTURES, DemoConfig, write_demo_data
from everest_ds.data.lists.video_list import read_list
from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.files import write_atomically
from everest_ds.study.conditions import NO_PRETRAINING, PRETRAININGS, Condition
from everest_ds.study.job import StudyJob, StudyOptions
from everest_ds.study.jobs import Job, JobKind, Runner
from everest_ds.study.report import write_report
from everest_ds.study.results import describe, read_result
from everest_ds.train.engine import shipped_files
from everest_ds.train.signals import EXIT_STOPPED

# A run takes less than a gibibyte of a GPU and is mostly waiting for Python.
_RUNS_A_GPU = 4


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much data and how many steps.

    Attributes:
        train: Videos for pre-training; the linear probe has their labels.
        labelled: Videos of each class for fine-tuning.
        test: Videos that both are scored on.
        pretrain_epochs: Epochs of pre-training, 37 steps each.
        finetune_epochs: Epochs of fine-tuning, 10 steps each.
    """

    train: int = 600
    labelled: int = 40
    test: int = 400
    pretrain_epochs: int = 16
    finetune_epochs: int = 25

    @classmethod
    def of(cls, options: StudyOptions) -> "Scale":
        """Return the scale that the options ask for."""
        return cls(pretrain_epochs=8, finetune_epochs=12) if options.quick else cls()

    def demo(self, shake: int) -> DemoConfig:
        """Return the videos' settings."""
        return DemoConfig(
            train=self.train,
            val=0,
            test=self.test,
            num_frames=24,
            movers=1,
            distractors=0,
            radius=10,
            classes="mover",
            clutter=30,
            shake=shake,
        )


def run(job: StudyJob, world: World) -> int:
    """Do the work of `everest study`."""
    return study(job.folder, job.options)


def study(folder: Path, options: StudyOptions, scale: Scale | None = None) -> int:
    """Run a study, or what is left of it, and write what came out.

    Args:
        folder: Where everything goes.
        options: What is compared, and how many runs go at a time.
        scale: How much data and how many steps; without it, what the options ask for.

    Returns:
        The exit code: 0, 1 when a run failed, or 75 when SIGTERM stopped the study; the same command continues it.

    Raises:
        KeyboardInterrupt: Ctrl-C; its runs are stopped by then, and have saved.
    """
    scale = scale or Scale.of(options)
    seeds = options.seeds or ((0,) if options.quick else (0, 1, 2))
    _open(folder, scale, options.shake)
    write_demo_data(folder / "data", scale.demo(options.shake))
    for seed in seeds:
        _write_labelled(folder, seed, scale.labelled)
    jobs = make_jobs(folder, options.conditions, seeds, scale)
    _write_commands(folder, jobs)
    num_gpus = torch.cuda.device_count()
    slots = options.jobs or (_RUNS_A_GPU * num_gpus if num_gpus else _num_cores())
    print(
        f"{len(options.conditions)} conditions, seeds {' '.join(map(str, seeds))}: {len(jobs)} runs, {slots} at a "
        f"time on {f'{num_gpus} GPUs' if num_gpus else 'the CPU'}",
        flush=True,
    )
    runner = Runner(jobs=jobs, slots=slots, num_gpus=num_gpus, on_done=describe)
    is_stopped = False
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        runner.run()
    except _Terminated:
        is_stopped = True
    finally:
        signal.signal(signal.SIGTERM, before)
    results = [
        result
        for condition in options.conditions
        for seed in seeds
        if (result := read_result(folder, condition, seed, jobs)) is not None
    ]
    print(f"\n{write_report(folder, results, chance=1 / len(TEXTURES))}\n{folder}", flush=True)
    for job in runner.failed:
        print(f"failed or not run: {job.kind} {job.name}, see {job.log}", flush=True)
    if is_stopped:
        print(f"stopped; the same command continues (exit code {EXIT_STOPPED})", flush=True)
        return EXIT_STOPPED
    return 1 if runner.failed else 0


def make_jobs(folder: Path, conditions: Sequence[Condition], seeds: Sequence[int], scale: Scale) -> list[Job]:
    """Return the runs of some conditions, seed after seed; a pre-training comes before what needs it, and once."""
    jobs: list[Job] = []
    for seed in seeds:
        of_weights: dict[str, Job] = {}
        for condition in conditions:
            name = condition.pretraining
            if name not in of_weights:
                of_weights[name] = _pretrain(folder, name, seed, scale)
                jobs += [of_weights[name], _probe(folder, name, seed, of_weights[name])]
            jobs.append(_finetune(folder, condition, seed, of_weights[name], scale))
    return jobs


def _pretrain(folder: Path, name: str, seed: int, scale: Scale) -> Job:
    words = ["pretrain", "study", "--data.train-list", f"{folder / 'data' / 'train.csv'}", *_common(seed)]
    words += ["--optim.epochs", f"{scale.pretrain_epochs}", *PRETRAININGS[name]]
    return _job("pretrain", f"{name}-{seed}", folder, words)


def _finetune(folder: Path, condition: Condition, seed: int, pretrain: Job, scale: Scale) -> Job:
    data = folder / "data"
    words = ["finetune", "study_ft", "--data.train-list", f"{folder / f'labelled-{seed}.csv'}"]
    words += ["--data.val-list", f"{data / 'test.csv'}", "--data.class-names", f"{data / 'classes.txt'}"]
    words += [*_common(seed), "--optim.epochs", f"{scale.finetune_epochs}", *condition.finetune]
    if condition.pretraining == NO_PRETRAINING:
        return _job("finetune", f"{condition.name}-{seed}", folder, words)
    words += ["--init-from", f"{pretrain.out}"]
    return _job("finetune", f"{condition.name}-{seed}", folder, words, pretrain)


def _probe(folder: Path, name: str, seed: int, pretrain: Job) -> Job:
    data = folder / "data"
    words = ["evaluate", f"{pretrain.out}", "--recipe", "study_ft", "--protocol", "linear", "--precision", "fp32"]
    words += ["--train-list", f"{data / 'train.csv'}", "--list", f"{data / 'test.csv'}", "--batch-rows", "32"]
    return _job("probe", f"{name}-{seed}", folder, words, pretrain)


def _job(kind: JobKind, name: str, folder: Path, words: Sequence[str], needs: Job | None = None) -> Job:
    place = folder / "runs" / name
    return Job(kind=kind, name=name, words=(*words, "--out", f"{place / kind}"), folder=place, needs=needs)


def _common(seed: int) -> tuple[str, ...]:
    systems = shipped_files()["zero0"]
    return ("--run.seed", f"{seed}", "--precision", "fp32", "--ds-config", f"{systems}")


def _open(folder: Path, scale: Scale, shake: int) -> None:
    """Write down what was asked for, or refuse a folder that holds something else."""
    stamp = folder / "study.json"
    wanted = json.dumps(asdict(scale) | {"shake": shake}, indent=2) + "\n"
    if stamp.is_file():
        if stamp.read_text() != wanted:
            raise UserError(f"{folder} holds a study of other settings ({stamp}); name another folder")
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no study; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(stamp, wanted)


def _write_labelled(folder: Path, seed: int, of_each: int) -> None:
    """Draw so many training videos of each class: those that a seed's fine-tunings learn from."""
    rows = read_list(folder / "data" / "train.csv")
    random.Random(seed).shuffle(rows)
    by_label = [[row for row in rows if row.label == label] for label in range(len(TEXTURES))]
    chosen = [row for same in by_label for row in same[:of_each]]
    lines = [f"{row.path.relative_to(folder)} {row.label}\n" for row in chosen]
    write_atomically(folder / f"labelled-{seed}.csv", "".join(lines))


def _write_commands(folder: Path, jobs: Sequence[Job]) -> None:
    lines = ["# The runs of this study, in an order in which they can be run by hand; one thread each on a CPU.\n"]
    write_atomically(folder / "commands.sh", "".join([*lines, *(f"{job.command}\n" for job in jobs)]))


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Terminated(KeyboardInterrupt):
    """SIGTERM: as Ctrl-C, but what there is so far is still reported."""


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise _Terminated
