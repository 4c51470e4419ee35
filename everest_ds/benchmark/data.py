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
from typing import TYPE_CHECKING, Any, Literal

from everest_ds.config import Config, FinetuneConfig, PretrainConfig
from everest_ds.data.lists.run_lists import read_lists
from everest_ds.data.lists.video_list import VideoRow
from everest_ds.data.readers.choice import choose_reader, obstacle
from everest_ds.errors import UserError

if TYPE_CHECKING:
    import torch

    from everest_ds.benchmark.stages import Costs, LeftOut, Way
    from everest_ds.train.tasks import Task

OneReader = Literal["decord", "pyav", "torchcodec"]
_AUTO_READERS: tuple[OneReader, ...] = ("pyav", "decord")


@dataclass(frozen=True, kw_only=True)
class DataBenchmarkOptions:
    """What is measured."""

    lists: tuple[Path, ...] = ()
    """Lists to measure side by side; data.train_list without this."""
    readers: tuple[OneReader, ...] = ()
    """Libraries to read with; without this data.reader, for auto pyav and decord, where they work."""
    repeats: tuple[int, ...] = (1,)
    """Clips, each of its own crop, of one decoded video."""
    workers: tuple[int, ...] = (1, 2)
    """Loader processes, one measurement each; `--workers` with no number after it leaves the loader out."""
    rounds: int = 7
    """Rounds whose median counts, after one of warm-up."""
    clips: int = 16
    """Videos of each list, spread over it; every round makes the same clips of them."""
    compare: bool = False
    """Also measure the official way to a pre-training clip: decord, PIL, normalised floats."""
    clips_per_s: float | None = None
    """Clips a second that one GPU trains, to say how many GPUs are fed."""
    json: bool = False
    """One JSON line for each list and way instead of a table."""

    def __post_init__(self) -> None:
        """Check each field by itself."""
        counts = [("rounds", self.rounds), ("clips", self.clips)]
        counts += [(name, value) for name in ("repeats", "workers") for value in getattr(self, name)]
        for name, value in counts:
            if value < 1:
                raise UserError(f"--{name} {value} must be at least 1")
        if not self.repeats:
            raise UserError("--repeats has no number; give 1 for a clip a video, and others beside it")
        if self.clips_per_s is not None and not self.clips_per_s > 0:
            raise UserError(f"--clips-per-s {self.clips_per_s} must be above 0")


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
    ways: list["Way"]
    costs: list["Costs"]
    readable: list[int]
    left_out: list["LeftOut"]
    frames: tuple[int, int]
    sizes: list[str]


def benchmark_data(config: Config, options: DataBenchmarkOptions) -> None:
    """Measure and print.

    Raises:
        UserError: A list is missing or empty, none of its videos can be read, or a reader cannot serve here.
    """
    runs = [(path, read_lists(_of_list(config, path))) for path in _lists(config, options)]
    readers = _readers(config, options)
    if config.data.keep_decoded:
        raise UserError("data.keep_decoded keeps frames in memory, so that no reading is left to measure; unset it")
    if options.compare:
        _require_comparable(config, [row for _, lists in runs for row in lists.train])

    from everest_ds.benchmark.data_report import describe, format_table
    from everest_ds.benchmark.machine import describe_machine
    from everest_ds.benchmark.stages import measure_round, one_thread

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


def _lists(config: Config, options: DataBenchmarkOptions) -> tuple[Path, ...]:
    if options.lists:
        return tuple(dict.fromkeys(options.lists))
    if config.data.train_list is None:
        raise UserError("no list to measure; give --data.train-list FILE, or --lists FILE... for several")
    return (Path(config.data.train_list),)


def _of_list(config: Config, path: Path) -> Config:
    """Return the run that trains on a list and scores nothing."""
    if isinstance(config, FinetuneConfig):
        return replace(config, data=replace(config.data, train_list=str(path), val_list=None, test_list=None))
    return replace(config, data=replace(config.data, train_list=str(path)))


def _readers(config: Config, options: DataBenchmarkOptions) -> list[OneReader]:
    """Return the readers to measure; refuse those that cannot serve."""
    if options.readers:
        wanted = list(dict.fromkeys(options.readers))
        for reader in wanted:
            choose_reader(reader)
        return wanted
    chosen = choose_reader(config.data.reader)
    if config.data.reader != "auto":
        return [chosen]  # type: ignore[list-item]
    return [reader for reader in _AUTO_READERS if obstacle(reader) is None]


def _require_comparable(config: Config, rows: Sequence[VideoRow]) -> None:
    if not isinstance(config, PretrainConfig):
        raise UserError(f"--compare knows the official way to a pre-training clip, and {config.recipe} fine-tunes")
    if config.data.sampling_seconds is not None:
        raise UserError(
            f"--compare counts frames, as the official loaders do, and data.sampling_seconds is "
            f"{config.data.sampling_seconds}; leave out one of the two"
        )
    fault = obstacle("decord")
    if fault is not None:
        raise UserError(f"--compare needs decord, which the official loaders read with: {fault}")
    windows = [row for row in rows if row.start_s is not None]
    if windows:
        raise UserError(
            f"--compare reads whole videos, as the official loaders do, and {len(windows)} rows are windows, the "
            f"first of {windows[0].path}; leave --compare out, or give a list without windows"
        )


def _begin(
    path: Path,
    config: Config,
    rows: Sequence[VideoRow],
    readers: Sequence[OneReader],
    options: DataBenchmarkOptions,
) -> Measured:
    """Choose videos, set the ways up, and go through all of it once."""
    from everest_ds.benchmark.stages import Costs, OurWay, Way, warm_up

    num = min(options.clips, len(rows))
    chosen = [rows[place * len(rows) // num] for place in range(num)]
    device = _device()
    ways: list[Way] = []
    if options.compare:
        from everest_ds.benchmark.official_clip import OfficialWay
        from everest_ds.data.clips.cuts import PretrainCut

        assert isinstance(config, PretrainConfig)
        cut = PretrainCut(config.data, num_frames=config.candidate_frames)
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
    from everest_ds.data.readers.video import Video

    frames, sizes = [], []
    for row in rows:
        video = Video.of_row(row, reader)
        height, width = video.read([0]).shape[1:3]
        frames.append(video.num_frames)
        sizes.append(f"{width}x{height}")
    return frames, sizes


def _task(config: Config, reader: OneReader, *, num_workers: int, repeats: int = 1) -> "Task":
    """Return the task of a run, its model without memory: only its clips are wanted."""
    import torch

    from everest_ds.train.tasks import make_task

    data: Any = replace(config.data, reader=reader, num_workers=num_workers, repeats=repeats)
    batch = replace(config.batch, global_size=2 * repeats, micro_size=2 * repeats)  # any that repeats divide
    with torch.device("meta"):
        return make_task(replace(config, data=data, batch=batch))


def _device() -> "torch.device | None":
    import torch

    return torch.device("cuda") if torch.cuda.is_available() else None


def _loader_rates(one: Measured, way: "Way", options: DataBenchmarkOptions) -> dict[int, float]:
    """Return the clips a second of the loader by its number of processes; the official way has no loader here."""
    from everest_ds.benchmark.data_loader import loader_clips_per_s
    from everest_ds.benchmark.stages import OurWay

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
