"""Reading videos with PyAV, which brings its own FFmpeg.

Opening reads all packets, without decoding them, to learn the times of the shown frames; for MP4 files with
keyframes only (Motion JPEG) it reads just the index. Reading decodes only the packets that a wanted frame depends
on: from the keyframe before it to its own, without unwanted frames that no other frame refers to. If packets do not
say which frames there are (`packets.Packets.pts` is None: AVI with B-frames, streams that begin between keyframes,
packets without a frame, containers and codecs that no test covers), frames are counted instead: the video is
decoded once when it is opened, and again from its beginning when frames are read.
"""

import contextlib
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from everest_ds.data.readers.base import PixelLimit, VideoReadError
from everest_ds.data.readers.orientation import orientation_of
from everest_ds.data.readers.packets import FAULTS, Span, open_stream, read_packets, reason_of
from everest_ds.data.readers.quirks import Quirk

# Codecs whose unreferenced frames can be skipped. H.264 marks them in each packet, and no other frame depends on
# them (except the concealment of damage); HEVC marks them for one temporal layer only, others rarely have any.
_SKIPPING_CODECS = ("h264",)


class PyavReader:
    """An open video; see `everest_ds.data.readers.base.Reader`. Frames of different sizes are an error."""

    def __init__(self, path: Path, limit: PixelLimit | None = None) -> None:
        self._path = path
        self._limit = limit or PixelLimit()
        self._size: tuple[int, int] | None = None
        # One for all frames: setting up a conversion takes longer than converting a frame.
        self._reformatter = VideoReformatter()
        try:
            self._container, self._stream = open_stream(path, self._limit)
            # Damage must raise here: concealing it would use other frames than decoding from the start does; see
            # `_decode_for`.
            self._stream.codec_context.options |= {"err_detect": "explode"}
            self._packets = read_packets(self._container, self._stream, hold=True)
            self._counted_pts: list[int | None] = []
            if self._packets.pts is None:
                self._counted_pts = [frame.pts for frame in self._all_frames()]
            self.num_frames = len(self._packets.pts or self._counted_pts)
        except FAULTS as error:
            raise VideoReadError(path, reason_of(error)) from error
        if self.num_frames == 0:
            raise VideoReadError(path, "none of its frames can be shown")

    def times_s(self) -> NDArray[np.float64]:
        """Return the start of each frame in seconds; evenly spaced if the file has no times."""
        pts = [time for time in self._counted_pts if time is not None]
        ascends = all(earlier < later for earlier, later in pairwise(pts))
        if len(pts) == self.num_frames and ascends and Quirk.DECODING_TIMES not in self._packets.quirks:
            return (np.array(pts, dtype=np.float64) - pts[0]) / self._packets.ticks_per_s
        return self._packets.times_s(self.num_frames)

    def read(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """Return the frames at the given indices."""
        places: dict[int, list[int]] = {}
        for place, index in enumerate(indices):
            places.setdefault(index, []).append(place)
        frames: NDArray[np.uint8] | None = None
        for index, pixels in self._found(sorted(places)):
            if frames is None:
                height, width, _ = pixels.shape
                self._limit.require(self._path, len(indices), width, height)
                frames = np.empty((len(indices), *pixels.shape), dtype=np.uint8)
            for place in places[index]:
                frames[place] = pixels
        assert frames is not None
        return frames

    def stream(self, indices: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        """Yield the frames at the given indices, distinct and ascending, one at a time to save memory.

        Yields:
            frame_HWC, uint8, RGB.

        Raises:
            VideoReadError: A frame cannot be decoded.
        """
        for index, (found, pixels) in zip(indices, self._found(indices), strict=True):
            if found != index:
                raise VideoReadError(self._path, f"frame {index} of {self.num_frames} cannot be decoded")
            yield pixels.copy()

    def _found(self, wanted: Sequence[int]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Yield (index, pixels) of the wanted frames, ascending; pixels are valid until the next frame."""
        find = self._count_to if self._packets.pts is None else self._decode_for
        missing = set(wanted)
        try:
            for index, frame in find(wanted):
                missing.discard(index)
                yield index, self._pixels(frame)
        except FAULTS as error:
            raise VideoReadError(self._path, reason_of(error)) from error
        if missing:
            raise VideoReadError(self._path, f"frame {min(missing)} of {self.num_frames} cannot be decoded")

    def _count_to(self, wanted: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """Decode from the beginning, and yield the wanted frames."""
        remaining = set(wanted)
        for index, frame in enumerate(self._all_frames()):
            if index in remaining:
                yield index, frame
            if index >= wanted[-1]:
                return

    def _decode_for(self, wanted: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """Decode the packets that the wanted frames depend on, and yield the frames.

        After a fault, or if a frame is missing, the rest of the span is taken from decoding the whole file: a fault
        may be concealed with any earlier frame, and a seek may have ended too late.
        """
        for span in self._packets.spans(wanted):
            missing = dict(span.targets)
            with contextlib.suppress(*FAULTS):
                for frame in self._decode(span, self._packets_of(span)):
                    if frame.pts in missing:
                        yield missing.pop(frame.pts), frame
            if missing:
                for frame in self._all_frames():
                    if frame.pts in missing:
                        yield missing.pop(frame.pts), frame
                    if not missing:
                        break

    def _packets_of(self, span: Span) -> Iterator[Any]:
        """Yield the packets of a span; none if the container cannot seek to its beginning."""
        if self._packets.held is not None:
            yield from self._packets.held[span.key.position : span.stop]
            return
        self._container.seek(span.key.seek_to, stream=self._stream)
        length = span.stop - span.key.position
        for packet in self._filled_packets():
            if packet.pts == span.key.pts:
                yield packet
                yield from islice(self._filled_packets(), length - 1)
                return

    def _filled_packets(self) -> Iterator[Any]:
        """Yield packets from the container's position, without empty ones: the scan did not count them either."""
        return (packet for packet in self._container.demux(self._stream) if packet.size)

    def _decode(self, span: Span, packets: Iterator[Any]) -> Iterator[Any]:
        """Reset the decoder, and yield all frames of the packets."""
        decoder = self._stream.codec_context
        decoder.flush_buffers()
        skips = decoder.name in _SKIPPING_CODECS
        for packet in packets:
            if packet.pts < span.key.pts:  # may refer to frames before the keyframe; no later frame refers to it
                continue
            if skips:
                decoder.skip_frame = "DEFAULT" if packet.pts in span.targets else "NONREF"
            yield from self._same_size(decoder.decode(packet))
        yield from self._same_size(decoder.decode(None))

    def _all_frames(self) -> Iterator[Any]:
        """Decode all frames, concealing damage; opens the file again, since some cannot seek to their start."""
        container, stream = open_stream(self._path, self._limit)
        with container:
            yield from self._same_size(container.decode(stream))

    def _same_size(self, frames: Any) -> Iterator[Any]:
        """Yield the frames; raise ValueError when their size changes."""
        for frame in frames:
            size = (frame.width, frame.height)
            self._size = self._size or size
            if size != self._size:
                begun = "{}x{}".format(*self._size)
                raise ValueError(f"its frames change from {begun} to {size[0]}x{size[1]} pixels")
            yield frame

    def _pixels(self, frame: Any) -> NDArray[np.uint8]:
        """Return a frame as RGB, rotated and mirrored as the file says; a view, valid until the next frame."""
        plane = self._reformatter.reformat(frame, format="rgb24", threads=1).planes[0]
        pixels: NDArray[np.uint8] = np.ndarray(
            (plane.height, plane.width, 3), np.uint8, buffer=memoryview(plane), strides=(plane.line_size, 3, 1)
        )
        return orientation_of(frame).apply(pixels)
