"""A program, so that a test can kill it: reads all frames of videos with one reader, prints a JSON line per video.

``python -m tests.unit.data.readers.read_all READER VIDEO...``
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from everest_ds.data.readers.video import Video, VideoReadError


def main(reader: str, paths: list[str]) -> None:
    for path in map(Path, paths):
        try:
            video = Video(path, reader=reader)  # type: ignore[arg-type]
            frames = [video.read([index]) for index in (0, video.num_frames - 1)]
            for start in range(0, video.num_frames, 32):
                frames.append(video.read(range(start, min(start + 32, video.num_frames)))[-1:])
            outcome: dict[str, object] = {"frames": video.num_frames, "shape": frames[0].shape[1:]}
            assert len({part.shape for part in frames}) == 1
        except VideoReadError as error:
            assert error.path == path
            outcome = {"reason": error.reason}
        print(json.dumps({"name": path.name} | outcome), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
