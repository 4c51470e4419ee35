"""Videos with further streams of other lengths: sound, subtitles, covers and second videos."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

FRAMES_PER_S = 10
CODECS = {"webm": ("libvpx", "libopus"), "avi": ("mpeg4", "mp2"), "flv": ("libx264", "aac")}
_SOUND_RATE = 48_000
_SUBTITLE_HEADER = b"""[Script Info]
ScriptType: v4.00+

[V4+ Styles]
Format: Name, Fontname, Fontsize
Style: Default,Arial,16

[Events]
Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text
"""


class StreamFile:
    """A builder of a file with several streams: lengths and starts in seconds, packets muxed in order of time."""

    def __init__(self, path: Path, **options: str) -> None:
        self.path = path
        self._kind = path.suffix[1:]
        self._container: Any = av.open(f"file:{path}", "w", options=options)
        self._packets: list[tuple[float, Any]] = []

    def picture(self, length_s: float, *, start_s: float = 0.0, b_frames: int = 0) -> StreamFile:
        """Add a video stream of ten frames per second; each frame is brighter than the previous one."""
        codec = CODECS.get(self._kind, ("libx264", "aac"))[0]
        stream = self._container.add_stream(codec, rate=Fraction(FRAMES_PER_S))
        stream.width, stream.height, stream.pix_fmt, stream.thread_count = 64, 48, "yuv420p", 1
        stream.options = {"bf": str(b_frames), "g": "5"} if codec != "libvpx" else {"deadline": "realtime"}
        for index in range(round(length_s * FRAMES_PER_S)):
            image = np.full((48, 64, 3), 20 + index % 200, dtype=np.uint8)
            image[::2, index % 64] = 255
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = index + round(start_s * FRAMES_PER_S), Fraction(1, FRAMES_PER_S)
            self._keep(stream.encode(frame))
        self._keep(stream.encode())
        return self

    def sound(self, length_s: float, *, start_s: float = 0.0) -> StreamFile:
        """Add silence."""
        codec = CODECS.get(self._kind, ("libx264", "aac"))[1]
        stream = self._container.add_stream(codec, rate=_SOUND_RATE, layout="mono")
        step = 960
        kind = "s16" if codec in ("mp2", "libopus") else "fltp"
        for index in range(round(length_s * _SOUND_RATE / step)):
            dtype = np.int16 if kind == "s16" else np.float32
            frame = av.AudioFrame.from_ndarray(np.zeros((1, step), dtype=dtype), format=kind, layout="mono")
            frame.sample_rate, frame.time_base = _SOUND_RATE, Fraction(1, _SOUND_RATE)
            frame.pts = index * step + round(start_s * _SOUND_RATE)
            self._keep(stream.encode(frame))
        self._keep(stream.encode())
        return self

    def cover(self) -> StreamFile:
        """Add a cover picture."""
        image = io.BytesIO()
        with av.open(image, "w", format="image2pipe") as container:
            stream = container.add_stream("mjpeg", rate=1)
            stream.width, stream.height, stream.pix_fmt = 32, 32, "yuvj420p"
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 90, dtype=np.uint8), format="rgb24")
            for packet in (*stream.encode(frame), *stream.encode()):
                container.mux(packet)
        self._container.add_attachment("cover.jpg", "image/jpeg", image.getvalue())
        return self

    def text(self, length_s: float, *, start_s: float = 0.0) -> StreamFile:
        """Add subtitles of one line."""
        codec = {"webm": "webvtt", "mkv": "srt"}.get(self._kind, "mov_text")
        stream = self._container.add_stream(codec)
        stream.codec_context.subtitle_header = _SUBTITLE_HEADER
        data = b"\x00\x05hello" if codec == "mov_text" else b"hello"
        packet = av.Packet(data)
        packet.stream, packet.time_base = stream, Fraction(1, 1000)
        packet.pts = packet.dts = round(start_s * 1000)
        packet.duration = round(length_s * 1000)
        self._keep([packet])
        return self

    def write(self) -> Path:
        """Mux the packets, close the file and return its path."""
        for _, packet in sorted(self._packets, key=lambda pair: pair[0]):
            self._container.mux(packet)
        self._container.close()
        return self.path

    def _keep(self, packets: Any) -> None:
        self._packets += [(float(packet.dts * packet.time_base), packet) for packet in packets]


def cut_off(path: Path, share: float) -> Path:
    """Return a copy of a file that contains only the first ``share`` of its bytes."""
    content = path.read_bytes()
    target = path.with_stem(f"{path.stem}-cut")
    target.write_bytes(content[: round(len(content) * share)])
    return target
