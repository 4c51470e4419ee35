"""Plan and run a study: its videos, its runs in order, and its results.

DIR/data/             the videos; the class is the object that moves
    labelled-0.csv    the few labelled videos of a seed
    study.json        the settings; a study with other settings needs another folder
    commands.sh       every command, to run some by hand
    runs/NAME-SEED/   pretrain, probe, finetune: run directories with their commands and logs
    results.jsonl     one line a condition and seed
    paired.jsonl      the baseline against each other condition over all seeds, one line a score
    table.md, *.svg   results, by table of the paper
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

from everest_ds.console.messages import say
from everest_ds.data.demo import DemoConfig, write_demo_data
from everest_ds.data.lists.video_list import read_list
from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.files import write_atomically
from everest_ds.study.conditions import NO_PRETRAINING, PRETRAININGS, Condition, StudyJob, StudyOptions
from everest_ds.study.jobs import Job, JobKind, Runner
from everest_ds.study.results import outcome_text, read_result, write_report
from everest_ds.study.worlds.physics import PhysicsConfig, try_drawing, write_physics_data
from everest_ds.train.checkpoints.owner import OWNER, owning
from everest_ds.train.engine import shipped_files
from everest_ds.train.signals import EXIT_STOPPED

_CLASSES = 4  # of every world
# A run needs less than 1 GiB of GPU memory and spends most of its time in Python.
_RUNS_A_GPU = 4


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much data and how many steps."""

    train: int = 600  # videos for pre-training; the linear probe has their labels
    labelled: int = 40  # videos of each class for fine-tuning
    test: int = 400  # videos that both are scored on
    pretrain_epochs: int = 16  # of 37 steps each
    finetune_epochs: int = 25  # of 10 steps each


QUICK = Scale(pretrain_epochs=8, finetune_epochs=12)


def run(job: StudyJob, world: World) -> int:
    """Run a study as the only owner of its folder; two studies there would overwrite each other's runs."""
    with owning(job.folder, world):
        return study(job.folder, job.options)


def study(folder: Path, options: StudyOptions, scale: Scale | None = None) -> int:
    """Run the jobs of a study that are not done yet, and write the results.

    Returns:
        The exit code: 0, 1 if a run failed, or 75 if SIGTERM stopped the study; the same command resumes it.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed; the runs have saved and ended.
        UserError: The folder contains something else, or the physics world cannot be drawn.
    """
    scale = scale or (QUICK if options.quick else Scale())
    seeds = options.seeds_to_run
    _prepare(folder, options, scale)
    jobs = make_jobs(folder, options.conditions, seeds, scale, keep_ratio=options.keep_ratio)
    lines = ["# The runs of this study, in an order in which they can be run by hand; one thread each on a CPU."]
    write_atomically(folder / "commands.sh", "\n".join([*lines, *(job.command for job in jobs), ""]))
    num_gpus = torch.cuda.device_count()
    slots = options.jobs or (_RUNS_A_GPU * num_gpus if num_gpus else len(os.sched_getaffinity(0)))
    say(
        f"{len(options.conditions)} conditions, seeds {' '.join(map(str, seeds))}: {len(jobs)} runs, {slots} at a "
        f"time on {f'{num_gpus} GPUs' if num_gpus else 'the CPU'}"
    )
    runner = Runner(jobs=jobs, slots=slots, num_gpus=num_gpus, on_done=outcome_text)
    is_stopped = False
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        runner.run()
    except _Terminated:
        is_stopped = True
    finally:
        signal.signal(signal.SIGTERM, before)
    found = [read_result(condition, seed, jobs) for condition in options.conditions for seed in seeds]
    results = [result for result in found if result is not None]
    print(f"\n{write_report(folder, results, chance=1 / _CLASSES)}", flush=True)
    say(str(folder))
    for job in runner.failed:
        print(f"failed or not run: {job.kind} {job.name}, see {job.log}", flush=True)
    if is_stopped:
        print(f"stopped; the same command resumes the study (exit code {EXIT_STOPPED})", flush=True)
        return EXIT_STOPPED
    return 1 if runner.failed else 0


def make_jobs(
    folder: Path,
    conditions: Sequence[Condition],
    seeds: Sequence[int],
    scale: Scale,
    keep_ratio: float | None = None,
) -> list[Job]:
    """Return the runs of conditions, seed after seed; each pre-training once, before the runs that need it.

    ``keep_ratio`` applies to probes, and to fine-tunings whose condition sets none. None uses the recipe's.
    """
    data, systems = folder / "data", shipped_files()["zero0"]
    train, test = data / "train.csv", data / "test.csv"
    jobs: list[Job] = []

    def add(kind: JobKind, name: str, words: Sequence[object], needs: Job | None = None) -> Job:
        own = folder / "runs" / name
        words = (*words, "--out", own / kind)
        jobs.append(Job(kind=kind, name=name, words=tuple(map(str, words)), folder=own, needs=needs))
        return jobs[-1]

    for seed in seeds:
        common = ("--run.seed", seed, "--precision", "fp32", "--ds-config", systems)
        pretrained: dict[str, Job] = {}
        for condition in conditions:
            weights = condition.pretraining
            if weights not in pretrained:
                words = ["pretrain", "study", "--data.train-list", train, *common]
                words += ["--optim.epochs", scale.pretrain_epochs, *PRETRAININGS[weights]]
                run = pretrained[weights] = add("pretrain", f"{weights}-{seed}", words)
                words = ["evaluate", run.out, "--recipe", "study_ft", "--protocol", "linear", "--precision", "fp32"]
                words += ["--train-list", train, "--list", test, "--batch-rows", 32]
                words += [] if keep_ratio is None else ["--keep-ratio", keep_ratio]
                add("probe", f"{weights}-{seed}", words, needs=run)
            words = ["finetune", "study_ft", "--data.train-list", folder / f"labelled-{seed}.csv"]
            words += ["--data.val-list", test, "--data.class-names", data / "classes.txt"]
            words += [*common, "--optim.epochs", scale.finetune_epochs]
            if keep_ratio is not None and "--selection.keep-ratio" not in condition.finetune:
                words += ["--selection.keep-ratio", keep_ratio]
            words += condition.finetune
            needs = None if weights == NO_PRETRAINING else pretrained[weights]
            words += ["--init-from", needs.out] if needs else []
            add("finetune", f"{condition.name}-{seed}", words, needs=needs)
    return jobs


def _prepare(folder: Path, options: StudyOptions, scale: Scale) -> None:
    """Write settings, videos and each seed's labelled list; refuse a folder with other contents."""
    settings = folder / "study.json"
    wanted = json.dumps(asdict(scale) | _settings_of_data(options), indent=2) + "\n"
    if settings.is_file():
        if settings.read_text() != wanted:
            raise UserError(f"{folder} contains a study with other settings ({settings}); name another folder")
    elif folder.is_dir() and any(path.name != OWNER for path in folder.iterdir()):
        raise UserError(f"{folder} is not empty and contains no study; name another folder")
    else:
        if options.world == "physics":
            try_drawing()
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(settings, wanted)
    _write_data(folder / "data", options, scale)
    rows = read_list(folder / "data" / "train.csv")
    for seed in options.seeds_to_run:
        shuffled = list(rows)
        random.Random(seed).shuffle(shuffled)
        lines = [
            f"{row.path.relative_to(folder)} {label}\n"
            for label in range(_CLASSES)
            for row in [row for row in shuffled if row.label == label][: scale.labelled]
        ]
        write_atomically(folder / f"labelled-{seed}.csv", "".join(lines))


def _settings_of_data(options: StudyOptions) -> dict[str, str | int]:
    """Return the options that the videos depend on.

    Options added later are included only if they differ from their default, so that older studies can be resumed.
    """
    names = [name for name in ("world", "data_seed") if getattr(options, name) != getattr(StudyOptions, name)]
    return {name: getattr(options, name) for name in ("shake", *names)}


def _write_data(data: Path, options: StudyOptions, scale: Scale) -> None:
    if options.world == "physics":
        write_physics_data(data, PhysicsConfig(train=scale.train, test=scale.test, seed=options.data_seed))
        return
    demo = DemoConfig(
        train=scale.train, val=0, test=scale.test, seed=options.data_seed, num_frames=24, movers=1, distractors=0,
        radius=10, classes="mover", clutter=30, shake=options.shake,
    )  # fmt: skip
    write_demo_data(data, demo)


class _Terminated(KeyboardInterrupt):
    """Raised on SIGTERM: stops like Ctrl-C, but the results so far are still reported."""


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise _Terminated
