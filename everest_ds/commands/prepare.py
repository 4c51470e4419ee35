"""`everest prepare LIST... --out DIR`: videos re-encoded for training, and the lists of them.

Every video is read, encoded and verified in a process that can be killed. Originals are only read. DIR holds

    videos/FOLDER/STEM-HASH.mp4   a file for each video, or window of it, that the lists name
    manifest.jsonl                one line a file, as they come: what a later call goes on from
    summary.json                  how it was made, what is lost, bytes and faults of each list
    LIST, classes.txt             a list for each list, in its order, and the names of the classes
"""

import errno
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import tyro

from everest_ds.commands.parsing import parse
from everest_ds.config.sections import ReaderName
from everest_ds.data.curation.prepared import MANIFEST, Manifest, Targets, require_place, write_lists
from everest_ds.data.curation.reencode import (
    QUALITIES,
    CodecName,
    Prepared,
    PrepareSettings,
    prepare_video,
    target_name,
)
from everest_ds.data.lists.video_list import VideoRow, read_list
from everest_ds.data.loading.pool import Outcome, run_all
from everest_ds.data.readers.choice import choose_reader
from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.files import partial_path
from everest_ds.progress import with_progress

# Files after which it is known how much room the others will take.
_FILES_TO_ESTIMATE_BY = 32


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """How videos are prepared."""

    out: Path
    """Folder for videos, lists and the record; several calls may share it, for a train and a val list."""
    short_side: int | None = 256
    """Pixels of the shorter side, even; smaller videos keep their size, and 0 keeps all."""
    codec: CodecName = "mjpeg"
    """mjpeg: every frame by itself, quickest to read, largest; h264: smaller, without B-frames and deblocking."""
    gop: int = 1
    """Frames from one keyframe to the next, with h264: 16 halves the files of 1, and doubles the time to read."""
    quality: int | None = None
    """Less is better and larger: 2 to 31 with mjpeg (5 without this), the CRF, 0 to 51, with h264 (20)."""
    keep_every: int = 1
    """Keep every such frame only; it must divide the sampling stride of the recipe."""
    sampling_stride: int = 4
    """data.sampling_stride of the recipe that the videos are for; used with keep-every."""
    min_psnr: float = 30.0
    """Decibels that the worst of the frames compared must have."""
    reader: ReaderName = "auto"
    """Library that a file is verified with; the one that the run will have."""
    processes: int | None = None
    """Videos at a time; one a CPU core without this."""
    timeout_s: float = 600.0
    """Seconds that a video may take before its process is killed."""
    max_bad_share: float = 0.01
    """Share of the rows that may fail; more makes the exit code 1."""

    def __post_init__(self) -> None:
        for name in ("gop", "keep_every", "sampling_stride", "processes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")
        if self.short_side is not None and (self.short_side < 0 or self.short_side % 2):
            raise UserError(f"--short-side {self.short_side} must be even, or 0 to keep all sizes")
        if self.codec == "mjpeg" and self.gop != 1:
            raise UserError(
                f"--gop {self.gop} has no meaning with mjpeg, which has keyframes only; use --codec h264"
            )
        _, least, greatest = QUALITIES[self.codec]
        if self.quality is not None and not least <= self.quality <= greatest:
            raise UserError(f"--quality {self.quality} must be from {least} to {greatest} with {self.codec}")
        if self.sampling_stride % self.keep_every:
            raise UserError(
                f"--keep-every {self.keep_every} does not divide --sampling-stride {self.sampling_stride}: the "
                f"recipe would miss frames; use one of {_divisors(self.sampling_stride)}"
            )
        if not math.isfinite(self.min_psnr):
            raise UserError(f"--min-psnr {self.min_psnr} must be a number of decibels")
        if not self.timeout_s > 0:
            raise UserError(f"--timeout-s {self.timeout_s} must be above 0")
        if not 0 <= self.max_bad_share <= 1:
            raise UserError(f"--max-bad-share {self.max_bad_share} must be a share in [0, 1]")

    @property
    def settings(self) -> PrepareSettings:
        """What makes a file what it is."""
        return PrepareSettings(
            short_side=self.short_side or None,
            codec=self.codec,
            gop=self.gop,
            quality=QUALITIES[self.codec][0] if self.quality is None else self.quality,
            keep_every=self.keep_every,
            reader=self.reader,
        )


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Re-encode videos so that they are quick to read, each in a process that can be killed; go on where it is.

    Writes videos, a list for each list, manifest.jsonl and summary.json. Originals are only read.
    """

    sources: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="LIST...")]
    """Lists of videos, each of another name."""
    options: Annotated[PrepareOptions, tyro.conf.arg(name="")]


def main(words: list[str], world: World) -> int:
    """Parse, and prepare the lists."""
    if world.size > 1:
        raise UserError("everest prepare runs in one process and starts its own; start it without a launcher")
    arguments = parse(Arguments, words, "everest prepare", world)
    if not arguments.sources:
        raise UserError("prepare which lists? expected `everest prepare LIST... --out DIR`")
    return prepare(arguments.sources, arguments.options)


def prepare(sources: Sequence[Path], options: PrepareOptions) -> int:
    """Prepare the videos of lists, or what is left of them; return the exit code: 1 where more fail than may.

    Raises:
        UserError: A list cannot be read, two have one name, the folder holds something else, the reader cannot
            serve here, or the disk will not have room.
        OSError: The disk is full.
    """
    lists: Targets = {source: [(target_name(row), row) for row in read_list(source)] for source in sources}
    choose_reader(options.reader)
    choose_reader("pyav")
    earlier = require_place(sources, options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    manifest = Manifest(options.out / MANIFEST, options.settings)
    done = manifest.read(options.min_psnr)
    wanted = {target: row for rows in lists.values() for target, row in rows}
    todo = [row for target, row in wanted.items() if target not in done]
    if len(todo) < len(wanted):
        print(f"{len(wanted) - len(todo)} of {len(wanted)} videos are prepared already", flush=True)
    done |= _prepare_all(todo, manifest, options)
    return _conclude(lists, done, earlier, options)


def _prepare_all(todo: Sequence[VideoRow], manifest: Manifest, options: PrepareOptions) -> dict[str, Prepared]:
    """Prepare videos, note each, and return what came of them by target."""
    function = partial(prepare_video, settings=options.settings, folder=options.out, min_psnr_db=options.min_psnr)
    processes = options.processes or len(os.sched_getaffinity(0))
    outcomes = run_all(function, todo, num_workers=processes, timeout_s=options.timeout_s)
    done: dict[str, Prepared] = {}
    sizes: list[int] = []
    with _removing_partials(todo, done, processes, options.out), manifest.appending() as append, closing(outcomes):
        for outcome in with_progress(outcomes, len(todo)):
            prepared = _prepared_of(outcome, options.out)
            if prepared.is_disk_full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(options.out))
            append(outcome.item, prepared)
            done[target_name(outcome.item)] = prepared
            if prepared.fault is not None:
                print(f"left out: {outcome.item.path}: {prepared.fault}", flush=True)
                continue
            sizes.append(prepared.bytes_after)
            if len(sizes) == _FILES_TO_ESTIMATE_BY:
                _require_room(options.out, sum(sizes) / len(sizes) * (len(todo) - len(done)))
    return done


@contextmanager
def _removing_partials(
    todo: Sequence[VideoRow], done: Mapping[str, Prepared], processes: int, out: Path
) -> Iterator[None]:
    """Remove what processes had begun to write when something, Ctrl-C for instance, ended them."""
    try:
        yield
    except BaseException:
        left = (target for row in todo if (target := target_name(row)) not in done)
        for target in islice(left, 2 * processes):  # begun in order, one in each process
            partial_path(out / target).unlink(missing_ok=True)
        raise


def _prepared_of(outcome: Outcome[VideoRow, Prepared], out: Path) -> Prepared:
    if outcome.result is not None:
        return outcome.result
    partial_path(out / target_name(outcome.item)).unlink(missing_ok=True)
    return Prepared(fault=outcome.fault or "no answer")


def _require_room(out: Path, needed: float) -> None:
    free = shutil.disk_usage(out).free
    if needed > free:
        raise UserError(
            f"the other videos will take about {_size(needed)}, {out} has {_size(free)} left; make room and call "
            "again, or take another folder with --codec h264, a greater --quality or --keep-every"
        )


def _conclude(lists: Targets, done: dict[str, Prepared], earlier: dict[str, Any], options: PrepareOptions) -> int:
    """Write summary and lists, say what was made, and return the exit code."""
    lost = describe_loss(options.keep_every, options.sampling_stride)
    accounts = write_lists(lists, done, earlier, options.out, options.settings, lost)
    for name, account in accounts.items():
        print(
            f"{options.out / name}: {account['videos']} videos, {account['frames']} frames, "
            f"{_size(account['bytes_before'])} before, {_size(account['bytes_after'])} now "
            f"(x{account['growth']:.2f}); {account['left_out']} of {account['rows']} rows left out"
        )
    print(f"lost: {lost}")
    rows = sum(account["rows"] for account in accounts.values())
    share = sum(account["left_out"] for account in accounts.values()) / rows
    if share > options.max_bad_share:
        print(f"{share:.2%} of the rows are left out, more than --max-bad-share {options.max_bad_share:.2%}")
        return 1
    return 0


def describe_loss(keep_every: int, stride: int) -> str:
    """Return in words what a preparation cannot give back."""
    lost = "sound, and what the new encoding and size do not keep"
    if keep_every == 1:
        return lost
    left = stride // keep_every
    places = "1 place is" if left == 1 else f"{left} places are"
    return (
        f"{lost}; all but every {keep_every}th frame: a recipe with data.sampling_stride={stride} must read these "
        f"videos with data.sampling_stride={left} (data.sampling_seconds stays: frames keep their times), and of "
        f"{stride} neighbouring places where its clips could start {places} left"
    )


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def _divisors(number: int) -> str:
    return ", ".join(str(value) for value in range(1, number + 1) if number % value == 0)
