"""Rows with a window, and the setting of the reader, in training and scoring datasets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from everest_ds.config import FinetuneDataConfig, PretrainDataConfig, ViewsConfig
from everest_ds.data.clips.cuts import PretrainCut
from everest_ds.data.clips.dataset import ClipDataset
from everest_ds.data.clips.sampling import SampleKey
from everest_ds.data.clips.views import ViewDataset
from everest_ds.data.lists.video_list import VideoRow
from everest_ds.errors import UserError
from tests.unit.data.readers.video_files import shown, write_ramp

CONFIG = PretrainDataConfig(num_frames=8, sampling_stride=2, image_size=32, num_workers=0)
CUT = PretrainCut(CONFIG)
VIEW_DATA = FinetuneDataConfig(num_frames=4, sampling_stride=3, image_size=32, num_workers=0)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("reader", ["auto", "pyav"])
def test_clips_of_a_row_with_a_window_stay_in_it(keep: bool, reader: str, tmp_path: Path) -> None:
    write_ramp(tmp_path / "ramp.mp4")
    rows = [
        VideoRow(tmp_path / "ramp.mp4", 0, start_s=1.0, end_s=2.0),
        VideoRow(tmp_path / "ramp.mp4", 1, start_s=3.0, end_s=4.0),
        VideoRow(tmp_path / "ramp.mp4", 2),
    ]
    config = replace(CONFIG, num_frames=3, keep_decoded=keep, reader=reader)  # type: ignore[arg-type]
    dataset = ClipDataset(rows, PretrainCut(config), seed=0, noise_length=1)
    seen: list[set[int]] = []
    for index in range(3):
        clips = [dataset[SampleKey(epoch, index)] for epoch in range(30)]
        assert not any(clip.bad for clip in clips)
        seen.append({frame for clip in clips for frame in shown(clip.pixels.permute(1, 2, 3, 0).numpy())})
        frames_T = np.concatenate([clip.frames_T for clip in clips])
        first = (10, 30, 0)[index]
        assert (frames_T.min() + first, frames_T.max() + first) == (min(seen[-1]), max(seen[-1]))
    # The official code never draws the last possible start, so the last frame is never used.
    assert seen[0] == set(range(10, 19))
    assert seen[1] == set(range(30, 39))
    assert min(seen[2]) < 10
    assert max(seen[2]) > 30


def test_window_without_a_frame_is_a_bad_sample(tmp_path: Path) -> None:
    write_ramp(tmp_path / "ramp.mp4")
    rows = [VideoRow(tmp_path / "ramp.mp4", 0, start_s=9.0, end_s=10.0), VideoRow(tmp_path / "ramp.mp4", 1)]
    clip = ClipDataset(rows, CUT, seed=0, noise_length=1)[SampleKey(0, 0)]
    assert clip.label == 1
    assert "window [9, 10) s" in clip.bad[0].reason


def test_reader_that_cannot_serve_is_refused_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("everest_ds.data.readers.choice.obstacle", lambda reader: "not installed; install it")
    with pytest.raises(UserError, match=r"data\.reader=torchcodec is not available: not installed"):
        ClipDataset([], PretrainCut(replace(CONFIG, reader="torchcodec")), seed=0, noise_length=1)
    with pytest.raises(UserError, match=r"data\.reader=pyav is not available: not installed"):
        ViewDataset([], replace(VIEW_DATA, reader="pyav"), ViewsConfig())


def test_views_of_a_row_with_a_window_stay_in_it(tmp_path: Path) -> None:
    write_ramp(tmp_path / "ramp.mp4")
    rows = [
        VideoRow(tmp_path / "ramp.mp4", 0, start_s=1.0, end_s=2.0),
        VideoRow(tmp_path / "ramp.mp4", 0, start_s=5.0, end_s=6.0),
    ]
    dataset = ViewDataset(rows, VIEW_DATA, ViewsConfig(num_temporal=1, num_spatial=1))  # 4 frames at stride 3
    clips_VCTHW = dataset[0].clips_VCTHW
    assert clips_VCTHW is not None
    assert shown(clips_VCTHW[0].permute(1, 2, 3, 0).numpy()) == [10, 13, 16, 19]
    assert "window [5, 6) s" in (dataset[1].bad or "")
