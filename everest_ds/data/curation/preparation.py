"""Options of `everest prepare`, and the files of its folder: record, lists, class names, summary. Needs no torch.

Place in the flow: lists and options -> `start_preparation` -> Preparation -> `data.curation.reencode`.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from everest_ds.config.sections import ReaderName
from everest_ds.data.curation.record import Record, identity
from everest_ds.data.lists.classes import NAMES_FILE
from everest_ds.data.lists.video_list import VideoRow, format_list, read_list
from everest_ds.data.readers.choice import choose_reader
from everest_ds.errors import UserError
from everest_ds.files import write_atomically

CodecName = Literal["mjpeg", "h264"]
"""Codec of prepared videos."""

QUALITIES: dict[CodecName, tuple[int, int, int]] = {"mjpeg": (5, 2, 31), "h264": (20, 0, 51)}
"""Default, lowest and highest quality setting of each codec; lower values are better.

Measured on five real clips: 36.7 to 39.4 dB with mjpeg at 5, 35.2 to 36.7 dB with h264 at 20 and every frame a
keyframe.
"""

MANIFEST, SUMMARY, VIDEOS = "manifest.jsonl", "summary.json", "videos"
_LONGEST_STEM = 160


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """Fields of `PrepareOptions` that change a prepared file; all files of a folder have the same settings.

    ``short_side`` None keeps all sizes.
    """

    short_side: int | None = 256
    codec: CodecName = "mjpeg"
    gop: int = 1
    quality: int = QUALITIES["mjpeg"][0]
    keep_every: int = 1
    reader: ReaderName = "auto"


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """How videos are prepared."""

    out: Path
    """Folder for videos, lists and the record; a train and a val list may be prepared into one folder."""
    short_side: int | None = 256
    """Pixels of the shorter side, even. Smaller videos keep their size; 0 keeps all sizes."""
    codec: CodecName = "mjpeg"
    """mjpeg: independent frames, fastest to read, largest; h264: smaller, without B-frames and deblocking."""
    gop: int = 1
    """Frames between keyframes, with h264; 16 instead of 1 halves the files and doubles the time to read them."""
    quality: int | None = None
    """Lower is better and larger: 2 to 31 with mjpeg (default 5); the CRF, 0 to 51, with h264 (default 20)."""
    keep_every: int = 1
    """Keep one frame of this many; must divide the sampling stride of the recipe."""
    sampling_stride: int = 4
    """data.sampling_stride of the recipe that will read the videos; used with keep-every."""
    min_psnr: float = 30.0
    """Lowest PSNR in decibels of the compared frames; a video below it is left out."""
    reader: ReaderName = "auto"
    """Library that verifies the files; use the one that the run will use."""
    processes: int | None = None
    """Number of videos prepared at a time; None for one per CPU core."""
    timeout_s: float = 600.0
    """Seconds after which the process of a video is killed and the video is left out."""
    max_bad_share: float = 0.01
    """Share of the rows that may fail; if more fail, the exit code is 1."""

    def __post_init__(self) -> None:
        for name in ("gop", "keep_every", "sampling_stride", "processes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")
        if self.short_side is not None and (self.short_side < 0 or self.short_side % 2):
            raise UserError(f"--short-side {self.short_side} must be even, or 0 to keep all sizes")
        if self.codec == "mjpeg" and self.gop != 1:
            raise UserError(
                f"--gop {self.gop} has no effect with mjpeg, which has keyframes only; use --codec h264"
            )
        _, least, greatest = QUALITIES[self.codec]
        if self.quality is not None and not least <= self.quality <= greatest:
            raise UserError(f"--quality {self.quality} must be from {least} to {greatest} with {self.codec}")
        stride = self.sampling_stride
        if stride % self.keep_every:
            divisors = ", ".join(str(value) for value in range(1, stride + 1) if stride % value == 0)
            raise UserError(
                f"--keep-every {self.keep_every} does not divide --sampling-stride {stride}: the recipe would miss "
                f"frames; use one of {divisors}"
            )
        if not math.isfinite(self.min_psnr):
            raise UserError(f"--min-psnr {self.min_psnr} must be a number of decibels")
        if not self.timeout_s > 0:
            raise UserError(f"--timeout-s {self.timeout_s} must be above 0")
        if not 0 <= self.max_bad_share <= 1:
            raise UserError(f"--max-bad-share {self.max_bad_share} must be a share in [0, 1]")

    @property
    def settings(self) -> PrepareSettings:
        """The settings that change a prepared file, with defaults filled in."""
        return PrepareSettings(
            short_side=self.short_side or None,
            codec=self.codec,
            gop=self.gop,
            quality=QUALITIES[self.codec][0] if self.quality is None else self.quality,
            keep_every=self.keep_every,
            reader=self.reader,
        )


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Result of a row: frames of the source (or its window), and frames, pixels and bytes of the prepared file."""

    fault: str | None = None
    """Why there is no file; None if there is one."""
    frames_in: int = 0
    frames_out: int = 0
    width: int = 0
    height: int = 0
    bytes_after: int = 0
    psnr_db: float | None = None
    """Lowest peak signal-to-noise ratio of a few frames, against the frames given to the encoder."""
    is_disk_full: bool = False
    """Whether writing failed because the disk is full; not recorded, since the video is not at fault."""


def target_name(row: VideoRow) -> str:
    """Return the path of a row's file in the folder of a preparation.

    Rows with the same window of the same file, under whatever path, share a target; other rows never do.
    """
    source = row.real_path
    part = f"{source}\n{row.start_s}\n{row.end_s}"
    digest = hashlib.sha256(part.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    stem = source.stem.encode("utf-8", "surrogateescape")[:_LONGEST_STEM].decode("utf-8", "ignore")
    target = str(Path(VIDEOS) / source.parent.name / f"{stem}-{digest}.mp4")
    return target.replace("\0", "_")


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """Lists to prepare."""

    lists: Mapping[Path, Sequence[tuple[str, VideoRow]]]
    """The rows of each list, each with its `target_name`."""
    options: PrepareOptions
    earlier: dict[str, Any]
    """The lists of earlier calls as summary.json describes them, by name."""


def start_preparation(sources: Sequence[Path], options: PrepareOptions) -> Preparation:
    """Read the lists, and check readers and folder; writes nothing.

    Raises:
        UserError: A list or a reader is at fault, or a file in the folder would be overwritten.
    """
    lists = {source: [(target_name(row), row) for row in read_list(source)] for source in sources}
    choose_reader(options.reader)
    choose_reader("pyav")
    return Preparation(lists=lists, options=options, earlier=_earlier_lists(sources, options.out))


def open_record(options: PrepareOptions) -> Record[str, Prepared]:
    """Return the record of a folder's files, by target.

    An entry is valid if the file has its recorded size, its source is unchanged or gone, and its worst frame is
    good enough. Rows that failed are tried again.
    """

    def parse(line: dict[str, Any]) -> tuple[str, Prepared]:
        fields = {name: line[name] for name in Prepared.__dataclass_fields__ if name != "is_disk_full"}
        return str(line["target"]), Prepared(**fields)

    def holds(line: dict[str, Any]) -> bool:
        if line["fault"] is not None or (line["psnr_db"] or 0.0) < options.min_psnr:
            return False
        made, source = identity(options.out / line["target"]), identity(Path(line["source"]))
        return made is not None and made[0] == line["bytes_after"] and source in (None, line["file"])

    return Record(options.out / MANIFEST, asdict(options.settings), of="preparation", parse=parse, holds=holds)


def record_line(row: VideoRow, prepared: Prepared) -> dict[str, Any]:
    """Return the line of a row in the record."""
    known = identity(row.path)
    line = {
        "source": str(row.path.absolute()),
        "start_s": row.start_s,
        "end_s": row.end_s,
        "target": target_name(row),
        "file": known,
        "bytes_before": known[0] if known else 0,
        **asdict(prepared),
    }
    del line["is_disk_full"]
    return line


def _earlier_lists(sources: Sequence[Path], out: Path) -> dict[str, Any]:
    """Check that no foreign file would be replaced; return the lists of earlier calls from summary.json."""
    for source in sources:
        if [other.name for other in sources].count(source.name) > 1:
            raise UserError(f"two lists are called {source.name}; rename one, or use another --out for it")
        if source.name in (MANIFEST, SUMMARY, VIDEOS, NAMES_FILE):
            raise UserError(f"a list cannot be called {source.name}, as another file of --out is; rename it")
    earlier: dict[str, Any] = {}
    if (out / SUMMARY).is_file():
        try:
            earlier = dict(json.loads((out / SUMMARY).read_text(encoding="utf-8"))["lists"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{out / SUMMARY} was not written by `everest prepare`; name another folder with --out"
            ) from error
    for source in sources:
        known = earlier.get(source.name, {}).get("source")
        if (out / source.name).exists() and known != str(source.resolve()):
            whose = f"belongs to {known}" if known else "was not written by `everest prepare`"
            raise UserError(f"{out / source.name} {whose}; rename {source}, or name another folder with --out")
    _class_names(sources, out)
    return earlier


def _class_names(sources: Sequence[Path], out: Path) -> bytes | None:
    """Return the content of classes.txt beside the lists and in the folder; None if there is no such file."""
    files = [folder / NAMES_FILE for folder in (out, *(source.parent for source in sources))]
    texts = {path.read_bytes(): path for path in files if path.is_file()}
    if len(texts) > 1:
        one, other, *_ = texts.values()
        raise UserError(f"{one} and {other} differ; lists with different classes need different --out folders")
    return next(iter(texts), None)


def write_lists(job: Preparation, done: Mapping[str, Prepared], lost: str) -> dict[str, dict[str, Any]]:
    """Write summary, lists and class names; return the summary's entry of each list, by name.

    ``done`` has the result of each target; ``lost`` is the text of `describe_loss`.
    """
    out = job.options.out
    accounts = {source.name: _account(source, rows, done) for source, rows in job.lists.items()}
    summary = {"settings": asdict(job.options.settings), "lost": lost, "lists": job.earlier | accounts}
    # The summary first: by it, a later call recognises the lists as ours.
    write_atomically(out / SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    for source, rows in job.lists.items():
        kept = [VideoRow(out / target, row.label) for target, row in rows if done[target].fault is None]
        write_atomically(out / source.name, format_list(out / source.name, kept) if kept else "")
    if (names := _class_names(list(job.lists), out)) is not None:
        write_atomically(out / NAMES_FILE, names)
    return accounts


def _account(source: Path, rows: Sequence[tuple[str, VideoRow]], done: Mapping[str, Prepared]) -> dict[str, Any]:
    made = {target: row for target, row in rows if done[target].fault is None}
    sources = {row.real_path for row in made.values()}
    bytes_before = sum(path.stat().st_size for path in sources if path.is_file())
    bytes_after = sum(done[target].bytes_after for target in made)
    return {
        "source": str(source.resolve()),
        "rows": len(rows),
        "left_out": sum(done[target].fault is not None for target, _ in rows),
        "videos": len(made),
        "frames": sum(done[target].frames_out for target in made),
        "bytes_before": bytes_before,
        "bytes_after": bytes_after,
        "growth": round(bytes_after / bytes_before, 3) if bytes_before else 0.0,
    }
