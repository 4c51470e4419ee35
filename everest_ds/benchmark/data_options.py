"""The options of `everest benchmark data`, and what they ask for, known before torch is imported."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from everest_ds.config import Config, FinetuneConfig, PretrainConfig
from everest_ds.data.lists.run_lists import Lists, read_lists
from everest_ds.data.lists.video_list import VideoRow
from everest_ds.data.readers.choice import choose_reader, obstacle
from everest_ds.errors import UserError

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
class DataJob:
    """Clips that are to be measured.

    Attributes:
        options: What is measured.
        runs: Each list, and what it holds.
        readers: Libraries to read with.
    """

    options: DataBenchmarkOptions
    runs: list[tuple[Path, Lists]]
    readers: list[OneReader]


def check(config: Config, options: DataBenchmarkOptions) -> DataJob:
    """Read the lists and choose the readers.

    Raises:
        UserError: A list is missing or empty, or a reader cannot serve here.
    """
    runs = [(path, read_lists(_of_list(config, path))) for path in _lists(config, options)]
    readers = _readers(config, options)
    if config.data.keep_decoded:
        raise UserError("data.keep_decoded keeps frames in memory, so that no reading is left to measure; unset it")
    if options.compare:
        _require_comparable(config, [row for _, lists in runs for row in lists.train])
    return DataJob(options=options, runs=runs, readers=readers)


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
