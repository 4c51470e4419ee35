"""`everest benchmark data RECIPE`: the cost of a recipe's clips on this machine, and how many GPUs it can feed.

Measured for each list and each way to read it (a reader; several clips from one decoded video; with --compare the
official loaders' way):

    CPU milliseconds a clip by phase, all threads   `clip_costs`: one process, rounds, interleaved ways
    clips a second of one core                      computed from these
    clips a second of N loader workers              the loader of a run, wall time
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from everest_ds.benchmark.clip_costs import (
    PHASES,
    Costs,
    OfficialWay,
    OurWay,
    Way,
    measure_round,
    one_thread,
    warm_up,
)
from everest_ds.benchmark.options import DataJob
from everest_ds.benchmark.report import Table, data_environment, rounded
from everest_ds.config import Config, PretrainConfig
from everest_ds.config.sections import ReaderName
from everest_ds.data.clips.cuts import PretrainCut
from everest_ds.data.clips.dataset import make_loader
from everest_ds.data.clips.sampling import GlobalBatchSampler
from everest_ds.data.lists.video_list import VideoRow
from everest_ds.data.readers.video import Video
from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.train.tasks import Task, make_task

# Timed batches of each loader worker, after one for warm-up.
_TIMED_BATCHES = 4


@dataclass(frozen=True)
class MeasuredList:
    """A list, the configuration that trains on it, and the ways to read it with their costs.

    Attributes:
        rows: All chosen videos.
        readable: Indices into ``rows`` of the videos that every way can read; only these are measured.
        videos: Fields of a record about them: smallest and largest number of frames, and sizes as WIDTHxHEIGHT in
            pixels.
    """

    path: Path
    config: Config
    rows: list[VideoRow]
    readable: list[int]
    ways: list[tuple[Way, Costs]]
    videos: dict[str, Any]


def run(job: DataJob, world: World) -> int:
    """Measure, print, and return 0.

    Raises:
        UserError: None of a list's videos can be read.
    """
    options = job.options
    say: Callable[[str], None] = (lambda text: None) if options.json else partial(print, flush=True)
    with one_thread():
        lists = [_begin(path, run.config, run.train, job, say) for path, run in job.runs]
        for number in range(options.rounds):
            say(f"round {number + 1} of {options.rounds}")
            for one in lists:
                spent = measure_round([way for way, _ in one.ways], one.readable, first=number)
                for (_, costs), phases in zip(one.ways, spent, strict=True):
                    costs.rounds.append(phases)
    environment = data_environment()
    records = [
        _record(one, way, costs, _loader_rates(one, way, options.workers, say), options.clips_per_s, environment)
        for one in lists
        for way, costs in one.ways
    ]
    print("\n".join(map(json.dumps, records)) if options.json else f"\n{format_records(records)}")
    return 0


def _begin(
    path: Path, config: Config, rows: Sequence[VideoRow], job: DataJob, say: Callable[[str], None]
) -> MeasuredList:
    """Choose videos, and make a clip of each once in every way as warm-up."""
    num = min(job.options.clips, len(rows))
    chosen = [rows[number * len(rows) // num] for number in range(num)]
    say(f"warm-up with {num} of {len(rows)} videos of {path}")
    ways = _ways(config, chosen, job)
    readable, left_out = warm_up(ways, num)
    for fault in left_out:
        say(f"left out: {fault.path}: {fault.reason} ({fault.way})")
    if not readable:
        fault = left_out[0]
        raise UserError(
            f"none of {num} videos of {path} can be read in every way. The first is {fault.path}: {fault.reason} "
            f"({fault.way}); for details run `everest check-data {path}`"
        )
    videos = (Video.of_row(chosen[idx], job.readers[0]) for idx in readable)
    frames, shapes = zip(*((video.num_frames, video.read([0]).shape) for video in videos), strict=True)
    said = {
        "videos": len(readable),
        "left_out": [{"path": str(bad.path), "way": bad.way, "reason": bad.reason} for bad in left_out],
        "frames": [min(frames), max(frames)],
        "sizes": sorted({f"{width}x{height}" for _, height, width, _ in shapes}),
    }
    return MeasuredList(path, config, chosen, readable, [(way, Costs()) for way in ways], said)


def _ways(config: Config, rows: Sequence[VideoRow], job: DataJob) -> list[Way]:
    device = torch.device("cuda") if torch.cuda.is_available() else None
    ways: list[Way] = []
    if job.options.compare:
        assert isinstance(config, PretrainConfig)
        cut = PretrainCut(replace(config.data, num_frames=config.candidate_frames))
        ways.append(OfficialWay(rows, cut, config.run.seed, device))
    for reader in job.readers:
        dataset = _task(config, reader, num_workers=0).make_dataset(rows)
        ways += [OurWay(dataset, repeats, device) for repeats in dict.fromkeys(job.options.repeats)]
    return ways


def _task(config: Config, reader: ReaderName, *, num_workers: int, repeats: int = 1) -> Task:
    """Return the task of a run with its model on the meta device, because only clips are needed."""
    data: Any = replace(config.data, reader=reader, num_workers=num_workers, repeats=repeats)
    batch = replace(config.batch, global_size=2 * repeats, micro_size=2 * repeats)  # any multiple of the repeats
    with torch.device("meta"):
        return make_task(replace(config, data=data, batch=batch))


def _loader_rates(
    one: MeasuredList, way: Way, workers: Sequence[int], say: Callable[[str], None]
) -> dict[str, float]:
    """Return the loader's clips a second by its number of workers; empty for the official way, without a loader."""
    if not isinstance(way, OurWay):
        return {}
    rows, rates = [one.rows[idx] for idx in one.readable], {}
    for count in dict.fromkeys(workers):
        say(f"loader: {one.path}, {way.name}, repeats {way.repeats}, {count} processes")
        task = _task(one.config, way.dataset.config.reader, num_workers=count, repeats=way.repeats)
        batch_size = min(one.config.batch.micro_size, len(rows))
        rates[str(count)] = loader_clips_per_s(task, rows, batch_size=batch_size)
    return rates


def loader_clips_per_s(
    task: Task, rows: Sequence[VideoRow], *, batch_size: int, now: Callable[[], float] = time.perf_counter
) -> float:
    """Return the clips a second of a task's loader, with the workers of its configuration and no work in between.

    The clock starts after one batch for each worker, when all workers are busy. Rows are repeated as needed. The
    batch size is lowered to a multiple of the repeats, and to an even number for mixing in pairs.
    """
    workers, repeats = task.config.data.num_workers, task.config.data.repeats
    dataset = task.make_dataset(rows)
    unit = math.lcm(repeats, 2 if dataset.mixer else 1)
    batch_size = max(batch_size // unit, 1) * unit
    if len(rows) * repeats < batch_size:
        dataset = task.make_dataset([*rows] * math.ceil(batch_size / (len(rows) * repeats)))
    sampler = GlobalBatchSampler(
        num_samples=len(dataset),
        repeats=repeats,
        global_size=batch_size,
        micro_size=batch_size,
        rank=0,
        world_size=1,
        seed=task.config.run.seed,
        end_step=workers * (1 + _TIMED_BATCHES),
    )
    began, clips = now(), 0
    for number, batch in enumerate(make_loader(dataset, sampler, micro_size=batch_size, pin_memory=False), start=1):
        batch.require_whole()
        if number > workers:
            clips += len(batch.index_B)
        else:
            began = now()
    return clips / (now() - began)


def _record(
    one: MeasuredList,
    way: Way,
    costs: Costs,
    loader: Mapping[str, float],
    gpu_clips_per_s: float | None,
    environment: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the record of one list and way."""
    official = next((costs for way, costs in one.ways if way.name == "official"), None)
    data, core, fed = one.config.data, costs.clips_per_s_core, None
    if gpu_clips_per_s is not None:
        fed = {workers: round(rate / gpu_clips_per_s, 4) for workers, rate in loader.items()}
        fed["all_cores"] = round(environment["cores"] * core / gpu_clips_per_s, 4)
    return {
        "benchmark": "data",
        "recipe": one.config.recipe,
        "list": str(one.path),
        "way": way.name,
        "repeats": way.repeats,
        **one.videos,
        "clip": f"{data.num_frames}x{data.image_size}x{data.image_size}",
        "sampling_stride": data.sampling_stride if data.sampling_seconds is None else None,
        "sampling_seconds": data.sampling_seconds,
        "rounds": len(costs.rounds),
        "ms": {phase: rounded(costs.phase_ms(phase)) for phase in PHASES},
        "clip_ms": round(costs.clip_ms, 4),
        "clip_p90_ms": round(costs.clip_p90_ms, 4),
        "ratio_to_official": None if official is None else round(costs.ratio_to(official), 4),
        "clips_per_s_core": round(core, 4),
        "loader_clips_per_s": {workers: round(rate, 4) for workers, rate in loader.items()},
        "gpu_clips_per_s": gpu_clips_per_s,
        "gpus_fed": fed,
        "cores_per_gpu": None if gpu_clips_per_s is None else round(gpu_clips_per_s / core, 4),
        "environment": dict(environment),
    }


def format_records(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the records as a table, with lines about how many GPUs are fed if that was asked."""
    first = records[0]
    machine, versions = first["environment"], first["environment"]["versions"]
    known = ", ".join(f"{name} {versions[name]}" for name in ("torch", "torchvision", "decord", "av", "pillow"))
    seconds = first["sampling_seconds"]
    sampling = f"at stride {first['sampling_stride']}" if seconds is None else f"with a frame every {seconds:g} s"
    lines = [
        f"{first['recipe']}: clips of {first['clip']} {sampling}; "
        f"{first['rounds']} rounds after one of warm-up, medians",
        f"{machine['cpu']}, {machine['cores']} cores; {known}; commit {machine['commit'] or 'unknown'}",
        "CPU ms a clip, all threads; `clip` is open + decode + augment, `ratio` is `clip` over the official way's;",
        "clips/s of one core (with collate), and of the loader with this number of workers (wall time)\n",
        *dict.fromkeys(f"{record['list']}: {_say_videos(record)}" for record in records),
        "",
    ]
    workers = list(dict.fromkeys(count for record in records for count in record["loader_clips_per_s"]))
    table = Table(
        ("list", max(4, *(len(record["list"]) for record in records)) + 2, "<"),
        ("way", 11, "<"),
        ("repeats", 7, "d"),
        *((column, 9, ".2f") for column in (*PHASES, "clip", "p90")),
        ("ratio", 9, ".3f"),
        ("1 core", 9, ".1f"),
        *((f"{count} proc.", 9, ".1f") for count in workers),
    )
    lines.append(table.head)
    for record in records:
        names = ("clip_ms", "clip_p90_ms", "ratio_to_official", "clips_per_s_core")
        values = [*record["ms"].values(), *(record[name] for name in names)]
        values += [record["loader_clips_per_s"].get(count) for count in workers]
        lines.append(table.row(record["list"], record["way"], record["repeats"], *values))
    if first["gpu_clips_per_s"] is not None:
        lines += ["", f"GPUs that train {first['gpu_clips_per_s']:g} clips/s:", *map(_say_fed, records)]
    return "\n".join(lines)


def _say_videos(record: Mapping[str, Any]) -> str:
    least, most = record["frames"]
    frames = str(least) if least == most else f"{least} to {most}"
    left_out = f", {len(record['left_out'])} left out" if record["left_out"] else ""
    return f"{record['videos']} videos{left_out}, {frames} frames, {', '.join(record['sizes'])}"


def _say_fed(record: Mapping[str, Any]) -> str:
    *loader, (_, cores) = record["gpus_fed"].items()
    processes = "".join(f"{count} processes feed {number:.2f}, " for count, number in loader)
    name = f"{record['list']}, {record['way']}, repeats {record['repeats']}"
    return f"  {name}: {processes}all cores {cores:.2f}; one needs {record['cores_per_gpu']:.1f} cores"
