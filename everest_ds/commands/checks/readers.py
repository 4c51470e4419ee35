"""Checks of the video readers, with a clip that is encoded here."""

import tempfile
from pathlib import Path

from everest_ds.commands.doctor import OK, Row
from everest_ds.config.sections import ReaderName
from everest_ds.data.demo import DemoConfig, encode_h264, render_video
from everest_ds.data.readers.choice import choose_reader, obstacle
from everest_ds.data.readers.video import Video, VideoReadError


def reader(name: ReaderName, broken: str) -> list[Row]:
    """Encode a clip, decode it with the reader and compare the frames; ``broken`` is the state if that fails."""
    what = f"reader {name}"
    fault = obstacle(name)
    if fault:
        return [(broken, what, fault)]
    frames = render_video(DemoConfig(num_frames=4), "train", 0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.mp4"
        encode_h264(path, frames)
        try:
            decoded = Video(path, reader=name).read([0, 3])
        except VideoReadError as error:
            return [(broken, what, f"decoding H.264: {error.reason}")]
    error_mean = abs(decoded.astype(int) - frames[[0, 3]].astype(int)).mean()
    role = "auto" if name == choose_reader("auto") else "available"
    return [(OK, what, f"{role}; decoding H.264: mean error {error_mean:.1f} of 255")]
