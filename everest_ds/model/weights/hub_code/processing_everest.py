"""The frames of an EVEREST run's middle view of a video, for transformers.

`everest convert --to hf` copies this file into the folder that it writes. It needs only transformers and
torchvision. `pipeline("video-classification", FOLDER, trust_remote_code=True)` uses it. Without
`trust_remote_code`, transformers spreads the frames over the whole video, even if the run did not.
"""

from typing import Any

import numpy as np
from transformers import VideoMAEVideoProcessor


class EverestVideoProcessor(VideoMAEVideoProcessor):
    """Transformers' video processor with the frames and the crop of the run's middle view.

    Args:
        sampling: dense: every ``sampling_stride``-th frame around the middle of the video; segment: the middle
            frame of each of ``num_frames`` equal parts.
        num_frames: Frames of a clip.
        sampling_stride: Source frames from one frame of the clip to the next.
        kwargs: Settings of transformers' own processor.
    """

    def __init__(
        self, sampling: str = "dense", num_frames: int = 16, sampling_stride: int = 1, **kwargs: Any
    ) -> None:
        super().__init__(num_frames=num_frames, **kwargs)
        self.clip_length = num_frames
        self.sampling = sampling
        self.sampling_stride = sampling_stride

    def sample_frames(
        self, metadata: Any, num_frames: int | None = None, fps: float | None = None, **kwargs: Any
    ) -> np.ndarray:
        """Return the frames of the clip, (num_frames,); a video that is too short is padded with its last frame."""
        total, length = metadata.total_num_frames, num_frames or self.clip_length
        if self.sampling == "segment":
            part = total / length
            return np.array([int(part * i + part / 2) for i in range(length)])
        strided = list(range(0, total, self.sampling_stride))
        strided += [strided[-1]] * (length - len(strided))
        start = (len(strided) - length) // 2
        return np.array(strided[start : start + length])

    def center_crop(self, image: Any, size: Any, *_: Any, **kwargs: Any) -> Any:
        """Crop the centre of frames (..., height, width); an odd rest puts it half a pixel to the top and left."""
        top, left = (image.shape[-2] - size.height) // 2, (image.shape[-1] - size.width) // 2
        return image[..., top : top + size.height, left : left + size.width]
