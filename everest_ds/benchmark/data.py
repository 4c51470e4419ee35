"""`everest benchmark data RECIPE`: what a recipe's clips cost on this machine, and how many GPUs they feed.

For each list and each way to read it (a reader; several clips of one decode; with --compare the official loaders')

    CPU milliseconds a clip by stage, of all threads   `stages`, `official`: one process, rounds, ways by turns
    clips a second of one core                         from these
    clips a second of N loader processes               `throughput`: the loader of a run, by the clock on the wall

`report` makes records and a table of it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from everest_ds.benchmark.data_loader import loader_clips_per_s
from everest_ds.benchmark.data_options import DataBenchmarkOptions, DataJob, OneReader
from everest_ds.benchmark.data_report import describe, format_table
from everest_ds.benchmark.machine import describe_machine
from everest_ds.benchmark.official_clip import OfficialWay
from everest_ds.benchmark.stages import Costs, LeftOut, OurWay, Way, measure_round, one_thread, warm_up
from everest_ds.config import Config, PretrainConfig
from everest_ds.data.clips.cuts import PretrainCut
from everest_ds.data.lists.video_list import VideoRow
from everest_ds.data.readers.video import Video
from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.train.tasks import Task, make_task


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One list and the ways that it is read.

    Attributes:
        path: The list.
        config: The run that trains on it.
        rows: Videos that are measured, and those that would be but are left out.
        ways: The ways.
        costs: One for each way.
        readable: Places in ``rows`` of videos that every way can read.
        left_out: The other videos, with the reasons.
        frames: Least and most frames of a readable one.
        sizes: WIDTHxHEIGHT in pixels of the readable ones.
    """

    path: Path
    config: Config
    rows: list[VideoRow]
    ways: list[Way]
    costs: list[Costs]
    readable: list[int]
    left_out: list[LeftOut]
    frames: tuple[int, int]
    sizes: list[str]


def run(job: DataJob, world: World) -> int:
    """Measure and print; return 0.

    Raises:
        UserError: None of a list's videos can be read.
    """
    options, runs, readers = job.options, job.runs, job.readers
    with one_thread():
        lists = [_begin(path, run.config, run.train, readers, options) for path, run in runs]
        for number in range(options.rounds):
            _say(options, f"round {number + 1} of {options.rounds}")
            for one in lists:
                spent = measure_round(one.ways, one.readable, first=number)
                for costs, stages in zip(one.costs, spent, strict=True):
                    costs.rounds.append(stages)
    machine = describe_machine()
    records: list[dict[str, Any]] = []
    for one in lists:
        rates = [_loader_rates(one, way, options) for way in one.ways]
        records += describe(one, rates, gpu_clips_per_s=options.clips_per_s, machine=machine)
    print("\n".join(json.dumps(record) for record in records) if options.json else f"\n{format_table(records)}")
    return 0


def _begin(
    path: Path,
    config: Config,
    rows: Sequence[VideoRow],
    readers: Sequence[OneReader],
    options: DataBenchmarkOptions,
) -> Measured:
    """Choose videos, set the ways up, and go through all of it once."""
    num = min(options.clips, len(rows))
    chosen = [rows[place * len(rows) // num] for place in range(num)]
    device = _device()
    ways: list[Way] = []
    if options.compare:
        assert isinstance(config, PretrainConfig)
        cut = PretrainCut(replace(config.data, num_frames=config.candidate_frames))
        ways.append(OfficialWay(chosen, cut, config.run.seed, device))
    for reader in readers:
        dataset = _task(config, reader, num_workers=0).make_dataset(chosen)
        ways += [OurWay(dataset, repeats, device) for repeats in dict.fromkeys(options.repeats)]
    _say(options, f"warm-up with {num} of {len(rows)} videos of {path}")
    readable, left_out = warm_up(ways, num)
    for fault in left_out:
        _say(options, f"left out: {fault.path}: {fault.reason} ({fault.way})")
    if not readable:
        fault = left_out[0]
        raise UserError(
            f"none of {num} videos of {path} can be read in every way, the first is {fault.path}: {fault.reason} "
            f"({fault.way}); `everest check-data {path}` tells more"
        )
    frames, sizes = _look_at([chosen[place] for place in readable], readers[0])
    return Measured(
        path=path,
        config=config,
        rows=chosen,
        ways=ways,
        costs=[Costs() for _ in ways],
        readable=readable,
        left_out=left_out,
        frames=(min(frames), max(frames)),
        sizes=sorted(set(sizes)),
    )


def _look_at(rows: Sequence[VideoRow], reader: OneReader) -> tuple[list[int], list[str]]:
    """Return the number of frames and the size of each video."""
    frames, sizes = [], []
    for row in rows:
        video = Video.of_row(row, reader)
        height, width = video.read([0]).shape[1:3]
        frames.append(video.num_frames)
        sizes.append(f"{width}x{height}")
    return frames, sizes


def _task(config: Config, reader: OneReader, *, num_workers: int, repeats: int = 1) -> Task:
    """Return the task of a run, its model without memory: only its clips are wanted."""
    data: Any = replace(config.data, reader=reader, num_workers=num_workers, repeats=repeats)
    batch = replace(config.batch, global_size=2 * repeats, micro_size=2 * repeats)  # any that repeats divide
    with torch.device("meta"):
        return make_task(replace(config, data=data, batch=batch))


def _device() -> torch.device | None:
    return torch.device("cuda") if torch.cuda.is_available() else None


def _loader_rates(one: Measured, way: Way, options: DataBenchmarkOptions) -> dict[int, float]:
    """Return the clips a second of the loader by its number of processes; the official way has no loader here."""
    if not isinstance(way, OurWay):
        return {}
    rows = [one.rows[place] for place in one.readable]
    batch_size = min(one.config.batch.micro_size, len(rows))
    rates = {}
    for workers in dict.fromkeys(options.workers):
        _say(options, f"loader: {one.path}, {way.name}, repeats {way.repeats}, {workers} processes")
        task = _task(one.config, way.name, num_workers=workers, repeats=way.repeats)  # type: ignore[arg-type]
        rates[workers] = loader_clips_per_s(task, rows, batch_size=batch_size)
    return rates


def _say(options: DataBenchmarkOptions, text: str) -> None:
    """Tell people how far it is; programs get records alone."""
    if not options.json:
        print(text, flush=True)
