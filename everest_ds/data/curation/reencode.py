"""One video, or a window of it, re-encoded for training.

Place in the flow: a row of a list -> a file of the same frames, smaller and quick to decode. Runs in a process that
can be killed (`data.loading.pool`). The source is only read. Frames keep their times, counted from the first one; a
display matrix is applied; sound is left out.
"""

import contextlib
import errno
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torchvision.transforms.v2 import functional as tvf

from everest_ds.config.sections import ReaderName
from everest_ds.data.lists.video_list import VideoRow
from everest_ds.data.readers.base import require_file
from everest_ds.data.readers.packets import FAULTS, reason_of, scan_packets
from everest_ds.data.readers.pyav import PyavReader
from everest_ds.data.readers.video import Video, VideoReadError, frames_of_window
from everest_ds.files import partial_path

CodecName = Literal["mjpeg", "h264"]
"""What files are encoded with."""

QUALITIES: dict[CodecName, tuple[int, int, int]] = {"mjpeg": (5, 2, 31), "h264": (20, 0, 51)}
"""Default, least and greatest quality of a codec in its own terms; less is better.

Measured on five real clips: 36.7 to 39.4 dB with mjpeg at 5, 35.2 to 36.7 dB with h264 at 20 and every frame a
keyframe.
"""

_TICKS_PER_S = 90_000
_TIME_TOLERANCE_S = 1e-3
# Frames whose pixels are held against what went in.
_SAMPLES = 8
_LONGEST_STEM = 160


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """What makes a prepared file what it is; files of other settings do not go into one folder.

    Attributes:
        short_side: Pixels of the shorter side, even; a smaller video is not enlarged. None keeps all sizes.
        codec: What it is encoded with.
        gop: Frames from one keyframe to the next; mjpeg has keyframes only.
        quality: In the codec's own terms: the quantiser's scale of mjpeg, the rate factor (CRF) of h264.
        keep_every: Every such frame is kept, from the first one on.
        reader: What reads it, as in training.
    """

    short_side: int | None = 256
    codec: CodecName = "mjpeg"
    gop: int = 1
    quality: int = QUALITIES["mjpeg"][0]
    keep_every: int = 1
    reader: ReaderName = "auto"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What came of a row.

    Attributes:
        fault: Why there is no file, in words; None where there is one.
        frames_in: Frames of the source, or of its window.
        frames_out: Frames of the file.
        width: Of the file, in pixels.
        height: Likewise.
        bytes_after: Size of the file.
        psnr_db: Peak signal-to-noise ratio of the worst of a few frames against what went into the encoder.
        is_disk_full: Whether there was no room for it, which is no fault of the video's.
    """

    fault: str | None = None
    frames_in: int = 0
    frames_out: int = 0
    width: int = 0
    height: int = 0
    bytes_after: int = 0
    psnr_db: float | None = None
    is_disk_full: bool = False


def target_name(row: VideoRow) -> str:
    """Return where a row's file stands below the folder of a preparation.

    Rows that name the same part of the same file, by whatever path, share it; others never do.
    """
    source = row.path.resolve()
    part = f"{source}\n{row.start_s}\n{row.end_s}"
    digest = hashlib.sha256(part.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    stem = source.stem.encode("utf-8", "surrogateescape")[:_LONGEST_STEM].decode("utf-8", "ignore")
    return str(Path("videos") / source.parent.name / f"{stem}-{digest}.mp4")


def prepare_video(row: VideoRow, settings: PrepareSettings, folder: Path, min_psnr_db: float) -> Prepared:
    """Make the file of a row below a folder, and verify it; where it cannot be made, there is none.

    Args:
        row: The video, or the window of it.
        settings: How.
        folder: Of the preparation.
        min_psnr_db: The least that the worst of the frames looked at may have.
    """
    torch.set_num_threads(1)
    target = folder / target_name(row)
    partial = partial_path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        prepared = _make(row, settings, partial, min_psnr_db)
        if prepared.fault is None:
            partial.replace(target)
        return prepared
    except VideoReadError as error:
        return Prepared(fault=error.reason)
    except FAULTS as error:  # in writing; what reading raises is a VideoReadError
        is_disk_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        return Prepared(fault=f"cannot be written: {reason_of(error)}", is_disk_full=is_disk_full)
    finally:
        with contextlib.suppress(OSError):  # none, or no folder for it
            partial.unlink()


def _make(row: VideoRow, settings: PrepareSettings, partial: Path, min_psnr_db: float) -> Prepared:
    require_file(row.path)
    reader = PyavReader(row.path)
    times_s = reader.times_s()
    window = range(reader.num_frames)
    if row.start_s is not None or row.end_s is not None:
        window = frames_of_window(row.path, times_s, row.start_s, row.end_s)
    kept = window[:: settings.keep_every]
    kept_s = times_s[kept.start : kept.stop : kept.step] - times_s[kept.start]
    frames = (_resized(frame, settings.short_side, row.path) for frame in reader.stream(kept))
    samples_THWC = _encode(partial, frames, kept_s, settings)
    height, width = samples_THWC.shape[1:3]
    fault, psnr_db = _verify(partial, samples_THWC, kept_s, settings.reader)
    if fault is None and psnr_db < min_psnr_db:
        fault = f"its worst frame came out at {psnr_db:.1f} dB, at least {min_psnr_db:g} dB are asked for"
    return Prepared(
        fault=fault,
        frames_in=len(window),
        frames_out=len(kept),
        width=width,
        height=height,
        bytes_after=partial.stat().st_size,
        psnr_db=psnr_db,
    )


def target_size(width: int, height: int, short_side: int | None) -> tuple[int, int]:
    """Return the width and height of a prepared frame: even, the shorter one ``short_side`` or as it was."""
    shorter = min(width, height)
    if short_side is None or shorter <= short_side:
        return width // 2 * 2, height // 2 * 2
    return 2 * round(width * short_side / shorter / 2), 2 * round(height * short_side / shorter / 2)


def _resized(frame_HWC: NDArray[np.uint8], short_side: int | None, path: Path) -> NDArray[np.uint8]:
    """Shrink a frame; one that keeps its size loses an odd last row and column."""
    height, width = frame_HWC.shape[:2]
    new_width, new_height = target_size(width, height, short_side)
    if min(new_width, new_height) < 2:
        raise VideoReadError(path, f"its frames of {width}x{height} pixels are too small to encode")
    if (new_width, new_height) == (width // 2 * 2, height // 2 * 2):
        return np.ascontiguousarray(frame_HWC[:new_height, :new_width])
    frame_CHW = rearrange(torch.from_numpy(np.ascontiguousarray(frame_HWC)), "h w c -> c h w")
    small_CHW = tvf.resize(frame_CHW, [new_height, new_width], antialias=True)
    return rearrange(small_CHW, "c h w -> h w c").contiguous().numpy()


def _sample_places(num_frames: int) -> list[int]:
    return sorted(set(np.linspace(0, num_frames - 1, min(num_frames, _SAMPLES)).round().astype(int).tolist()))


def _encode(
    path: Path, frames: Iterator[NDArray[np.uint8]], times_s: NDArray[np.float64], settings: PrepareSettings
) -> NDArray[np.uint8]:
    """Encode frames that start at the given times; return those that are to be compared, as they went in."""
    ticks = np.rint(times_s * _TICKS_PER_S).astype(int).tolist()
    places = set(_sample_places(len(ticks)))
    samples = []
    with av.open(f"file:{path}", "w", format="mp4") as container:
        stream = None
        for place, (frame_HWC, time) in enumerate(zip(frames, ticks, strict=True)):
            if stream is None:
                stream = _add_stream(container, frame_HWC.shape, _frames_per_s(times_s), settings)
            image = av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")
            image.pts, image.time_base = time, Fraction(1, _TICKS_PER_S)
            container.mux(stream.encode(image))
            if place in places:
                samples.append(frame_HWC)
        assert stream is not None
        container.mux(stream.encode())
    return np.stack(samples)


def _frames_per_s(times_s: NDArray[np.float64]) -> Fraction:
    """Return the average rate, 25 for a single frame."""
    if len(times_s) < 2:
        return Fraction(25)
    return Fraction((len(times_s) - 1) / float(times_s[-1])).limit_denominator(1001)


def _add_stream(
    container: av.container.OutputContainer,
    shape: Sequence[int],
    frames_per_s: Fraction,
    settings: PrepareSettings,
) -> av.VideoStream:
    stream: av.VideoStream
    if settings.codec == "mjpeg":
        stream = container.add_stream("mjpeg", rate=frames_per_s)
        stream.pix_fmt = "yuvj420p"
        stream.options = {"qmin": str(settings.quality), "qmax": str(settings.quality)}
    else:
        stream = container.add_stream("libx264", rate=frames_per_s)
        stream.pix_fmt = "yuv420p"
        # No B-frames, no deblocking, no arithmetic coding: quick to decode. No keyframes at cuts. Without the
        # macroblock tree the same frames give the same bytes.
        stream.options = {
            "g": str(settings.gop), "bf": "0", "crf": str(settings.quality), "tune": "fastdecode",
            "x264-params": "mbtree=0:scenecut=0",
        }  # fmt: skip
    stream.height, stream.width = shape[:2]
    stream.codec_context.time_base = stream.time_base = Fraction(1, _TICKS_PER_S)
    stream.thread_count = 1
    return stream


def _verify(
    path: Path, samples_THWC: NDArray[np.uint8], times_s: NDArray[np.float64], reader: ReaderName
) -> tuple[str | None, float]:
    """Hold a file against what went into it; return what is wrong with it, and its worst frame's PSNR in dB."""
    video = Video(path, reader=reader)
    if video.num_frames != len(times_s):
        return f"{len(times_s)} frames went in, {video.num_frames} came out", 0.0
    found_s = scan_packets(path).times_s(video.num_frames)
    late_s = float(np.abs(found_s - times_s).max())
    if late_s > _TIME_TOLERANCE_S:
        return f"a frame came out {late_s:.3f} s away from its time", 0.0
    decoded_THWC = video.read(_sample_places(len(times_s)))
    if decoded_THWC.shape != samples_THWC.shape:
        return f"frames of {samples_THWC.shape[1:3]} came out as {decoded_THWC.shape[1:3]}", 0.0
    return None, min(psnr_db(a, b) for a, b in zip(samples_THWC, decoded_THWC, strict=True))


def psnr_db(frame_HWC: NDArray[np.uint8], other_HWC: NDArray[np.uint8]) -> float:
    """Return the peak signal-to-noise ratio of two frames in decibels; 100 where they are alike."""
    error = np.square(frame_HWC.astype(np.float32) - other_HWC.astype(np.float32)).mean()
    return min(100.0, float(10 * np.log10(255**2 / max(error, 1e-12))))
