"""The options of `everest benchmark`, and checks of their combinations. Needs no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from everest_ds.config import Config, FinetuneConfig, PretrainConfig
from everest_ds.data.lists.run_lists import Lists, read_lists
from everest_ds.data.lists.video_list import VideoRow
from everest_ds.data.readers.choice import choose_reader, obstacle
from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.train.precision import PrecisionName

ReferenceName = Literal["everest", "videomae"]
OneReader = Literal["decord", "pyav", "torchcodec"]


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """Options of `everest benchmark step`."""

    micro_batch: Annotated[tuple[str, ...], tyro.conf.arg(metavar="{auto,N [N ...]}")] = ()
    """Clips of each process in a step: one or several numbers, or auto: 8, 16, 32 and so on until the GPU's memory
    is full. Default: the recipe's batch.micro_size. Every micro-batch is an optimiser step (no accumulation)."""
    steps: int = 20
    """Timed steps of each micro-batch."""
    warmup: int = 5
    """Steps before the timed ones."""
    ds_config: Path | None = None
    """DeepSpeed file that says how the steps are sharded. Default: plain ZeRO-2."""
    precision: PrecisionName = "auto"
    """auto: as in the DeepSpeed file, else bf16 on a GPU and fp32 on a CPU. autocast: weights and gradients in
    float32, matmuls in bfloat16."""
    memory_gib: float | None = None
    """Limit the GPU's memory to this many GiB."""
    kernels: int = 0
    """List this many of the kernels (on a CPU, operators) that take longest: time, share, calls in a step."""
    compare: tuple[ReferenceName, ...] = ()
    """Compare forward and backward pass with the official code in the folders EVEREST_REFERENCE_DIR and
    VIDEOMAE_REFERENCE_DIR, interleaved, without DeepSpeed and optimiser on both sides."""
    compare_gradients: tuple[str, ...] = ()
    """Compare steps with flat gradients and steps of DeepSpeed's own path, interleaved, for these files of
    ds_configs/ by name: zero0 zero1 zero2. --model.size thin shows the host's work, also on a CPU."""
    compare_saves: bool = False
    """Compare how long a checkpoint stops the training, with blocking and with background saves, interleaved;
    --steps saves of each. Checkpoints are written below the current folder and removed."""
    sweep_stages: bool = False
    """Measure every file of --stages in processes of its own, and write which one is fastest."""
    stages: tuple[str, ...] = ("zero1", "zero2", "zero3")
    """Files of ds_configs/ that --sweep-stages measures, by name; zero3_offload only if it is named."""
    sweep_ratio: tuple[float, ...] = ()
    """Measure steps at these ratios of selected tokens, interleaved, and fit a line to their times. The visible
    tokens keep their share of the selected ones."""
    sweep_frames: tuple[int, ...] = ()
    """The same for clips of these numbers of frames."""
    gpus: int | None = None
    """Processes that --sweep-stages starts. Default: one for each GPU of this machine, or one on a CPU."""
    out: Path | None = None
    """Output file of --sweep-stages. Default: runs/RECIPE-stages.json."""
    json: bool = False
    """Print one JSON line a micro-batch, or a sweep, instead of a table."""

    def sizes(self, config: Config) -> tuple[int, ...] | None:
        """Return the micro-batches to measure, in order; None for auto."""
        if self.micro_batch == ("auto",):
            return None
        if not self.micro_batch:
            return (config.batch.micro_size,)
        sizes = [int(word) if word.isdecimal() else 0 for word in self.micro_batch]
        if min(sizes) < 1:
            words = " ".join(self.micro_batch)
            raise UserError(f"--micro-batch {words} must be auto, or whole numbers of at least 1")
        return tuple(sizes)

    def require_consistent(self, config: Config, world: World) -> None:
        """Refuse options that are out of range or have no effect together."""
        for name, value, least in (
            ("steps", self.steps, 1),
            ("warmup", self.warmup, 0),
            ("kernels", self.kernels, 0),
        ):
            if value < least:
                raise UserError(f"--{name} {value} must be at least {least}")
        if self.memory_gib is not None and not 0 < self.memory_gib < float("inf"):
            raise UserError(f"--memory-gib {self.memory_gib} must be a number of GiB above 0")
        names = ("compare", "compare_gradients", "compare_saves", "sweep_stages", "sweep_ratio", "sweep_frames")
        modes = [f"--{name.replace('_', '-')}" for name in names if getattr(self, name)]
        if len(modes) > 1:
            raise UserError(f"{' and '.join(modes)} cannot be combined; run one measurement at a time")
        if (self.compare or self.compare_gradients or self.sweep_stages) and self.ds_config is not None:
            both = f"{modes[0]} with --ds-config {self.ds_config}"
            raise UserError(f"{both}: {modes[0]} takes no DeepSpeed file; remove --ds-config")
        if modes and world.size > 1 and not (self.compare_gradients or self.compare_saves):
            raise UserError(f"{modes[0]} got {world.size} processes; start it without a launcher")
        if self.compare and not isinstance(config, PretrainConfig):
            raise UserError(f"--compare needs a recipe of pre-training, and {config.recipe} is one of fine-tuning")
        for name, given in (("gpus", self.gpus), ("out", self.out)):
            if given is not None and not self.sweep_stages:
                raise UserError(f"--{name} {given} has an effect only with --sweep-stages; remove it, or add that")
        if self.gpus is not None and self.gpus < 1:
            raise UserError(f"--gpus {self.gpus} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class DataBenchmarkOptions:
    """Options of `everest benchmark data`."""

    lists: tuple[Path, ...] = ()
    """Lists to compare. Default: data.train_list."""
    readers: tuple[OneReader, ...] = ()
    """Libraries to read with. Default: data.reader; for auto, those of pyav and decord that work."""
    repeats: tuple[int, ...] = (1,)
    """Numbers of clips from one decoded video, each clip with a crop of its own."""
    workers: tuple[int, ...] = (1, 2)
    """Numbers of loader workers, one measurement each. `--workers` without a number skips the loader."""
    rounds: int = 7
    """Rounds to take the median of, after one for warm-up."""
    clips: int = 16
    """Videos of each list, evenly spread over it; every round makes the same clips of them."""
    compare: bool = False
    """Also measure the official way to make a pre-training clip: decord, PIL, normalised floats."""
    clips_per_s: float | None = None
    """Clips a second that one GPU trains, to compute how many GPUs are fed."""
    json: bool = False
    """Print one JSON line for each list and way instead of a table."""

    def __post_init__(self) -> None:
        counts = {"rounds": [self.rounds], "clips": [self.clips], "repeats": self.repeats, "workers": self.workers}
        for name, values in counts.items():
            if values and min(values) < 1:
                raise UserError(f"--{name} {min(values)} must be at least 1")
        if not self.repeats:
            raise UserError("--repeats has no number; give 1, or several numbers to compare")
        if self.clips_per_s is not None and not self.clips_per_s > 0:
            raise UserError(f"--clips-per-s {self.clips_per_s} must be above 0")


@dataclass(frozen=True)
class FlopsOptions:
    """Count multiply-accumulates with a profiler and compare them with the paper's tables."""

    json: bool = False
    """Print one JSON line a row instead of a table."""


@dataclass(frozen=True, kw_only=True)
class StepJob:
    """Steps to measure; ``sizes`` are the micro-batches in order, None for auto."""

    config: Config
    options: StepOptions
    sizes: tuple[int, ...] | None


def check_step(config: Config, options: StepOptions, world: World) -> StepJob:
    sizes = options.sizes(config)
    options.require_consistent(config, world)
    return StepJob(config=config, options=options, sizes=sizes)


@dataclass(frozen=True, kw_only=True)
class DataJob:
    """Clips to measure: each list with its rows, and the libraries to read it with."""

    options: DataBenchmarkOptions
    runs: list[tuple[Path, Lists]]
    readers: list[OneReader]


def check_data(config: Config, options: DataBenchmarkOptions) -> DataJob:
    """Read the lists and choose the readers.

    Raises:
        UserError: A list is missing or empty, or a reader is not available here.
    """
    default = () if config.data.train_list is None else (Path(config.data.train_list),)
    lists = options.lists or default
    if not lists:
        raise UserError("there is no list to measure; give --data.train-list FILE, or --lists FILE...")
    unscored: Any = {"val_list": None, "test_list": None} if isinstance(config, FinetuneConfig) else {}
    runs = []
    for path in dict.fromkeys(lists):
        data: Any = replace(config.data, train_list=str(path), **unscored)
        runs.append((path, read_lists(replace(config, data=data))))
    readers: list[Any] = [
        choose_reader(reader) for reader in dict.fromkeys(options.readers or (config.data.reader,))
    ]
    if not options.readers and config.data.reader == "auto":
        readers = [reader for reader in ("pyav", "decord") if obstacle(reader) is None]
    if config.data.keep_decoded:
        raise UserError("data.keep_decoded keeps frames in memory, so there is no reading to measure; turn it off")
    if options.compare:
        _require_comparable(config, [row for _, run in runs for row in run.train])
    return DataJob(options=options, runs=runs, readers=readers)


def _require_comparable(config: Config, rows: Sequence[VideoRow]) -> None:
    if not isinstance(config, PretrainConfig):
        raise UserError(f"--compare needs a recipe of pre-training, and {config.recipe} is one of fine-tuning")
    if config.data.sampling_seconds is not None:
        raise UserError(
            f"--compare samples by frame numbers, as the official loaders do, and data.sampling_seconds is "
            f"{config.data.sampling_seconds}; remove one of the two"
        )
    fault = obstacle("decord")
    if fault is not None:
        raise UserError(f"--compare needs decord, the reader of the official loaders: {fault}")
    windows = [row for row in rows if row.start_s is not None]
    if windows:
        raise UserError(
            f"--compare reads whole videos, as the official loaders do, and {len(windows)} rows are windows, the "
            f"first of {windows[0].path}; remove --compare, or give a list without windows"
        )
