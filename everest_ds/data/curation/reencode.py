"""Re-encoding of videos, or windows of them, for training.

Place in the flow: Preparation -> each row in a worker that can be killed -> a file with the same frames that is
faster to read -> record, lists, summary. Frames keep their times, counted from the first; the display matrix is
applied; sound is dropped.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from functools import partial
from itertools import islice
from pathlib import Path

import av
import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch.nn import functional as F

from everest_ds.config.sections import ReaderName
from everest_ds.console.messages import say
from everest_ds.data.curation.preparation import (
    Preparation,
    Prepared,
    PrepareOptions,
    PrepareSettings,
    open_record,
    record_line,
    target_name,
    write_lists,
)
from everest_ds.data.curation.record import Record
from everest_ds.data.lists.video_list import VideoRow
from everest_ds.data.loading.pool import run_all
from everest_ds.data.readers.base import require_file
from everest_ds.data.readers.packets import FAULTS, reason_of, scan_packets
from everest_ds.data.readers.pyav import PyavReader
from everest_ds.data.readers.video import Video, VideoReadError, frames_of_window
from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.files import partial_path
from everest_ds.progress import with_progress

_TICKS_PER_S = 90_000
_TIME_TOLERANCE_S = 1e-3
# Frames whose pixels are compared with the source.
_SAMPLES = 8

# Number of files after which the size of the others is estimated.
_FILES_TO_ESTIMATE_BY = 32


def run(job: Preparation, world: World) -> int:
    """Prepare the videos that are not in the record yet; return the exit code: 1 if too many rows fail."""
    options = job.options
    options.out.mkdir(parents=True, exist_ok=True)
    record = open_record(options)
    done = record.read()
    wanted = {target: row for rows in job.lists.values() for target, row in rows}
    todo = [row for target, row in wanted.items() if target not in done]
    if len(todo) < len(wanted):
        say(f"{len(wanted) - len(todo)} of {len(wanted)} videos are prepared already")
    return _conclude(job, done | _prepare_all(todo, record, options))


def _prepare_all(
    todo: Sequence[VideoRow], record: Record[str, Prepared], options: PrepareOptions
) -> dict[str, Prepared]:
    """Prepare videos, record each, and return the results by target."""
    out = options.out
    function = partial(prepare_video, settings=options.settings, folder=out, min_psnr_db=options.min_psnr)
    num_workers = options.processes or len(os.sched_getaffinity(0))
    outcomes = run_all(function, todo, num_workers=num_workers, timeout_s=options.timeout_s)
    done: dict[str, Prepared] = {}
    sizes: list[int] = []
    try:
        with contextlib.closing(outcomes):
            for outcome in with_progress(outcomes, len(todo)):
                target, prepared = target_name(outcome.item), outcome.result
                if prepared is None:
                    partial_path(out / target).unlink(missing_ok=True)
                    prepared = Prepared(fault=outcome.fault or "no answer")
                if prepared.is_disk_full:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out))
                record.append(record_line(outcome.item, prepared))
                done[target] = prepared
                if prepared.fault is not None:
                    say(f"warning: left out: {outcome.item.path}: {prepared.fault}")
                    continue
                sizes.append(prepared.bytes_after)
                if len(sizes) == _FILES_TO_ESTIMATE_BY:
                    _require_room(out, sum(sizes) / len(sizes) * (len(todo) - len(done)))
        return done
    except BaseException:  # Ctrl-C, for instance: remove the files that killed workers have left unfinished
        left = (target for row in todo if (target := target_name(row)) not in done)
        for target in islice(left, 2 * num_workers):  # they were begun in order, one in each worker
            partial_path(out / target).unlink(missing_ok=True)
        raise


def _require_room(out: Path, needed: float) -> None:
    free = shutil.disk_usage(out).free
    if needed > free:
        raise UserError(
            f"the remaining videos need about {_size(needed)}, {out} has {_size(free)} free; free some space and "
            "repeat the command, or use another folder with --codec h264, a higher --quality or --keep-every"
        )


def _conclude(job: Preparation, done: Mapping[str, Prepared]) -> int:
    """Write summary and lists, print an account of each list, and return the exit code."""
    options = job.options
    lost = describe_loss(options.keep_every, options.sampling_stride)
    accounts = write_lists(job, done, lost)
    for name, account in accounts.items():
        say(
            f"{options.out / name}: {account['videos']} videos, {account['frames']} frames, "
            f"{_size(account['bytes_before'])} before, {_size(account['bytes_after'])} now "
            f"(x{account['growth']:.2f}); {account['left_out']} of {account['rows']} rows left out"
        )
    say(f"lost: {lost}")
    rows = sum(account["rows"] for account in accounts.values())
    share = sum(account["left_out"] for account in accounts.values()) / rows
    if share > options.max_bad_share:
        say(f"warning: {share:.2%} of the rows are left out, more than --max-bad-share {options.max_bad_share:.2%}")
        return 1
    return 0


def describe_loss(keep_every: int, stride: int) -> str:
    """Return in words what prepared videos no longer contain."""
    lost = "sound, and details lost by the new encoding and size"
    if keep_every == 1:
        return lost
    left = stride // keep_every
    places = "1 start is" if left == 1 else f"{left} starts are"
    return (
        f"{lost}; all but one of {keep_every} frames: a recipe with data.sampling_stride={stride} must read these "
        f"videos with data.sampling_stride={left} (data.sampling_seconds stays: frames keep their times), and of "
        f"{stride} neighbouring starts of a clip {places} left"
    )


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def prepare_video(row: VideoRow, settings: PrepareSettings, folder: Path, min_psnr_db: float) -> Prepared:
    """Re-encode a row's video into a folder, and verify the file; if anything fails, no file remains."""
    torch.set_num_threads(1)
    target = folder / target_name(row)
    unfinished = partial_path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        prepared = _make(row, settings, unfinished, min_psnr_db)
        if prepared.fault is None:
            unfinished.replace(target)
        return prepared
    except VideoReadError as error:
        return Prepared(fault=error.reason)
    except FAULTS as error:  # from writing: reading raises VideoReadError
        is_disk_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        return Prepared(fault=f"cannot be written: {reason_of(error)}", is_disk_full=is_disk_full)
    finally:
        with contextlib.suppress(OSError):  # there is no file, or no folder
            unfinished.unlink()


def _make(row: VideoRow, settings: PrepareSettings, path: Path, min_psnr_db: float) -> Prepared:
    require_file(row.path)
    reader = PyavReader(row.path)
    times_s = reader.times_s()
    window = range(reader.num_frames)
    if row.start_s is not None or row.end_s is not None:
        window = frames_of_window(row.path, times_s, row.start_s, row.end_s)
    kept = window[:: settings.keep_every]
    kept_s = times_s[kept.start : kept.stop : kept.step] - times_s[kept.start]
    frames = (_resized(frame, settings.short_side, row.path) for frame in reader.stream(kept))
    samples_THWC = _encode(path, frames, kept_s, settings)
    height, width = samples_THWC.shape[1:3]
    fault, psnr_db = _verify(path, samples_THWC, kept_s, settings.reader)
    if fault is None and psnr_db < min_psnr_db:
        fault = f"its worst frame has a PSNR of {psnr_db:.1f} dB, --min-psnr is {min_psnr_db:g} dB"
    return Prepared(
        fault=fault,
        frames_in=len(window),
        frames_out=len(kept),
        width=width,
        height=height,
        bytes_after=path.stat().st_size,
        psnr_db=psnr_db,
    )


def target_size(width: int, height: int, short_side: int | None) -> tuple[int, int]:
    """Return the width and height of a prepared frame, both even; only larger frames shrink to ``short_side``."""
    shorter = min(width, height)
    if short_side is None or shorter <= short_side:
        return width // 2 * 2, height // 2 * 2
    return 2 * round(width * short_side / shorter / 2), 2 * round(height * short_side / shorter / 2)


def _resized(frame_HWC: NDArray[np.uint8], short_side: int | None, path: Path) -> NDArray[np.uint8]:
    """Shrink a frame; a frame that keeps its size loses its last row or column where their number is odd."""
    height, width = frame_HWC.shape[:2]
    new_width, new_height = target_size(width, height, short_side)
    if min(new_width, new_height) < 2:
        raise VideoReadError(path, f"its frames of {width}x{height} pixels are too small to encode")
    if (new_width, new_height) == (width // 2 * 2, height // 2 * 2):
        return np.ascontiguousarray(frame_HWC[:new_height, :new_width])
    frame_1CHW = rearrange(torch.from_numpy(np.ascontiguousarray(frame_HWC)), "h w c -> 1 c h w")
    small_1CHW = F.interpolate(frame_1CHW, (new_height, new_width), mode="bilinear", antialias=True)
    return rearrange(small_1CHW, "1 c h w -> h w c").contiguous().numpy()


def _sample_places(num_frames: int) -> list[int]:
    return sorted(set(np.linspace(0, num_frames - 1, min(num_frames, _SAMPLES)).round().astype(int).tolist()))


def _encode(
    path: Path, frames: Iterator[NDArray[np.uint8]], times_s: NDArray[np.float64], settings: PrepareSettings
) -> NDArray[np.uint8]:
    """Encode frames that start at the given times; return the unencoded frames at `_sample_places`."""
    ticks = np.rint(times_s * _TICKS_PER_S).astype(int).tolist()
    places = set(_sample_places(len(ticks)))
    samples = []
    with av.open(f"file:{path}", "w", format="mp4") as container:
        stream = None
        for place, (frame_HWC, time) in enumerate(zip(frames, ticks, strict=True)):
            if stream is None:
                average = (len(ticks) - 1) / float(times_s[-1]) if len(ticks) > 1 else 25
                frames_per_s = Fraction(average).limit_denominator(1001)
                stream = _add_stream(container, frame_HWC.shape, frames_per_s, settings)
            image = av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")
            image.pts, image.time_base = time, Fraction(1, _TICKS_PER_S)
            container.mux(stream.encode(image))
            if place in places:
                samples.append(frame_HWC)
        assert stream is not None
        container.mux(stream.encode())
    return np.stack(samples)


def _add_stream(
    container: av.container.OutputContainer, shape: Sequence[int], frames_per_s: Fraction, settings: PrepareSettings
) -> av.VideoStream:
    is_mjpeg = settings.codec == "mjpeg"
    stream: av.VideoStream = container.add_stream("mjpeg" if is_mjpeg else "libx264", rate=frames_per_s)
    stream.pix_fmt = "yuvj420p" if is_mjpeg else "yuv420p"
    if is_mjpeg:
        stream.options = {"qmin": str(settings.quality), "qmax": str(settings.quality)}
    else:
        # No B-frames, no deblocking, no arithmetic coding: fast to decode. No extra keyframes at cuts. Without the
        # macroblock tree, equal frames give equal bytes.
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
    """Compare a file with its source; return its fault (None for a good file), and its lowest PSNR in dB."""
    video = Video(path, reader=reader)
    if video.num_frames != len(times_s):
        return f"{len(times_s)} frames were encoded, the file has {video.num_frames}", 0.0
    found_s = scan_packets(path).times_s(video.num_frames)
    late_s = float(np.abs(found_s - times_s).max())
    if late_s > _TIME_TOLERANCE_S:
        return f"the time of a frame is off by {late_s:.3f} s", 0.0
    decoded_THWC = video.read(_sample_places(len(times_s)))
    if decoded_THWC.shape != samples_THWC.shape:
        return f"frames of size {samples_THWC.shape[1:3]} were encoded, the file has {decoded_THWC.shape[1:3]}", 0.0
    return None, min(psnr_db(a, b) for a, b in zip(samples_THWC, decoded_THWC, strict=True))


def psnr_db(frame_HWC: NDArray[np.uint8], other_HWC: NDArray[np.uint8]) -> float:
    """Return the peak signal-to-noise ratio of two frames in decibels; at most 100, for identical frames."""
    error = np.square(frame_HWC.astype(np.float32) - other_HWC.astype(np.float32)).mean()
    return min(100.0, float(10 * np.log10(255**2 / max(error, 1e-12))))
