"""Check of one video: opens it, decodes some frames, and compares them with the container's header.

Place in the flow: row of a list -> Finding. Runs in a process that can be killed (`data.loading.pool`).
"""

from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from everest_ds.config.sections import MAX_PIXELS, ReaderName
from everest_ds.data.curation.record import Record, identity
from everest_ds.data.lists.video_list import VideoPart, VideoRow
from everest_ds.data.readers.container import describe_missing, read_container
from everest_ds.data.readers.video import Video, VideoReadError, fault_of_the_video

# Frames at the end that are compared with each other: some decoders replace missing frames by copies.
_TAIL = 8


class Kind(StrEnum):
    """Verdict on a video: good, or the kind of fault."""

    GOOD = "good"
    MISSING = "missing"
    UNREADABLE = "unreadable"
    HANGING = "hanging"
    CRASHING = "crashing"
    TRUNCATED = "truncated"
    TOO_SHORT = "too_short"
    DUPLICATE_FRAMES = "duplicate_frames"
    EDIT_LIST = "edit_list"
    STARTS_LATE = "starts_late"


FaultName = Literal[
    "missing", "unreadable", "hanging", "crashing", "truncated", "too_short", "duplicate_frames", "edit_list",
    "starts_late",
]  # fmt: skip
"""All kinds of faults, for the command line."""

DEFAULT_BAD: tuple[FaultName, ...] = ("missing", "unreadable", "hanging", "crashing", "truncated")
"""Faults that keep a video out of training; videos with other faults are reported and read as far as possible."""


@dataclass(frozen=True, kw_only=True)
class ProbeSettings:
    """How thoroughly a video is checked."""

    samples: int = 8
    """Frames to decode, spread over the video from its first to its last."""
    min_frames: int = 1
    """A video with fewer frames is too short."""
    reader: ReaderName = "auto"
    max_pixels: int = MAX_PIXELS
    """Largest number of pixels (frames x height x width) of a video that are decoded at a time."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Result of a check: the gravest fault, its description (empty for a good video), and the video's size.

    Frames, and width and height in pixels, are 0 if the video cannot be opened.
    """

    kind: Kind
    detail: str = ""
    frames: int = 0
    width: int = 0
    height: int = 0


def probe_video(row: VideoRow, settings: ProbeSettings) -> Finding:
    """Check one video; a fault of the video is returned, not raised."""
    try:
        video = Video.of_row(row, settings.reader, settings.max_pixels)
        wanted = np.linspace(0, video.num_frames - 1, settings.samples).round().astype(int).tolist()
        tail = list(range(max(0, video.num_frames - _TAIL), video.num_frames))
        frames_THWC = video.read(sorted({*wanted, *tail}))
        with fault_of_the_video(row.path):
            kind, detail = _judge(row, settings, video.num_frames, frames_THWC[-len(tail) :])
    except VideoReadError as error:
        is_missing = isinstance(error.__cause__, FileNotFoundError)
        return Finding(kind=Kind.MISSING if is_missing else Kind.UNREADABLE, detail=error.reason)
    height, width = frames_THWC.shape[1:3]
    return Finding(kind=kind, detail=detail, frames=video.num_frames, width=width, height=height)


def _judge(
    row: VideoRow, settings: ProbeSettings, num_frames: int, tail_THWC: NDArray[np.uint8]
) -> tuple[Kind, str]:
    """Return the gravest fault of a readable video, and its description."""
    container = read_container(row.path)
    if container is not None and (cut := describe_missing(container)):
        return Kind.TRUNCATED, cut
    if num_frames < settings.min_frames:
        return Kind.TOO_SHORT, f"{num_frames} frames, a clip needs {settings.min_frames}"
    if len(tail_THWC) > 1 and (tail_THWC == tail_THWC[0]).all():
        fault = f"its last {len(tail_THWC)} frames are identical: a still scene, or a broken file"
        return Kind.DUPLICATE_FRAMES, fault
    if container is not None and not container.starts_with_key:
        return Kind.STARTS_LATE, "its first frame is not a keyframe: frames before the next one are wrong or copies"
    if container is not None and container.hidden:
        return Kind.EDIT_LIST, f"an edit list hides {container.hidden} frames at its start; they are left out"
    return Kind.GOOD, ""


def open_record(path: Path, settings: ProbeSettings) -> Record[VideoPart, Finding]:
    """Return the record of findings, by video and window.

    A finding is valid while its file has the same size and time of change. Videos that were missing or cut off are
    checked again: older versions took a file with longer sound for a cut off one.
    """

    def parse(line: dict[str, Any]) -> tuple[VideoPart, Finding]:
        fields = {name: line[name] for name in Finding.__dataclass_fields__} | {"kind": Kind(line["kind"])}
        return (Path(line["path"]), line["start_s"], line["end_s"]), Finding(**fields)

    def holds(line: dict[str, Any]) -> bool:
        known = identity(Path(line["path"]))
        return known is not None and known == line["file"] and line["kind"] != Kind.TRUNCATED

    known = asdict(settings)
    if settings.max_pixels == MAX_PIXELS:  # older records do not have it
        del known["max_pixels"]
    return Record(path, known, of="check", parse=parse, holds=holds)


def record_line(row: VideoRow, finding: Finding) -> dict[str, Any]:
    """Return the line of a finding in the record."""
    window = {"start_s": row.start_s, "end_s": row.end_s}
    return {"path": str(row.path), **window, "file": identity(row.path), **asdict(finding)}
