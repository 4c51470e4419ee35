from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from everest_ds.config import FinetuneDataConfig, ViewsConfig
from everest_ds.data.clips.views import (
    ViewDataset,
    crop_origins,
    dense_clips,
    make_view_loader,
    read_views,
    resize_shorter_side,
    segment_clips,
    spread,
)
from everest_ds.data.lists.video_list import VideoRow, read_list
from everest_ds.data.readers.video import Video

DATA = FinetuneDataConfig(num_frames=4, sampling_stride=3, image_size=32, num_workers=0)


class FakeVideo:
    """A video whose pixels encode their origin: red is the frame, green the row, blue the column."""

    def __init__(self, num_frames: int, height: int, width: int) -> None:
        self.num_frames = num_frames
        self.shape = height, width
        self.asked: list[int] = []

    def read(self, indices: list[int]) -> np.ndarray:
        self.asked += indices
        frames = np.zeros((len(indices), *self.shape, 3), dtype=np.uint8)
        frames[..., 0] = np.array(indices)[:, None, None]
        frames[..., 1] = np.arange(self.shape[0])[None, :, None]
        frames[..., 2] = np.arange(self.shape[1])[None, None, :]
        return frames


def views_of(video: FakeVideo, data: FinetuneDataConfig, num_temporal: int, num_spatial: int) -> torch.Tensor:
    views = ViewsConfig(num_temporal=num_temporal, num_spatial=num_spatial)
    return read_views(video, data, views)  # type: ignore[arg-type]


def official_views(case: dict[str, Any], clips: list[list[int]], num_crops: int) -> list[dict[str, Any]]:
    origins = crop_origins(case["resized_h"], case["resized_w"], 224, num_crops)
    return [
        {"chunk": k, "crop": m, "frames": clip, "y0": top, "x0": left}
        for k, clip in enumerate(clips)
        for m, (top, left) in enumerate(origins)
    ]


def test_dense_views_equal_official(golden_json: Callable[[str], Any]) -> None:
    cases = golden_json("frame_sampling")["finetune_dense_test"]
    assert len(cases) == 6
    for case in cases:
        clips = dense_clips(case["num_frames"], case["clip_len"], case["sampling_rate"], case["test_num_segment"])
        expected = [{k: v for k, v in view.items() if k not in "hw"} for view in case["views"]]
        assert official_views(case, clips, case["test_num_crop"]) == expected
        assert all((view["h"], view["w"]) == (224, 224) for view in case["views"])


def test_segment_views_equal_official(golden_json: Callable[[str], Any]) -> None:
    cases = [case for case in golden_json("frame_sampling")["ssv2_segment"] if case["mode"] == "test"]
    assert len(cases) == 10
    for case in cases:
        clips = segment_clips(case["num_frames"], case["num_segment"], 2)
        assert official_views(case, clips, 3) == case["views"]
        assert sorted(frame for clip in clips for frame in clip) == case["all_index"]


@pytest.mark.parametrize("num_clips", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("num_frames", [1, 2, 15, 16, 17, 63, 64, 65, 300])
def test_clips_of_any_number_stay_inside_the_video(num_frames: int, num_clips: int) -> None:
    for clips in (dense_clips(num_frames, 16, 4, num_clips), segment_clips(num_frames, 16, num_clips)):
        assert len(clips) == num_clips
        assert all(len(clip) == 16 and clip == sorted(clip) for clip in clips)
        assert all(0 <= frame < num_frames for clip in clips for frame in clip)
        assert clips == sorted(clips)


def test_one_view_is_the_one_in_the_middle() -> None:
    assert dense_clips(300, 16, 4, 1) == [list(range(116, 180, 4))]  # 75 strided: 29 before, 30 after
    assert segment_clips(64, 16, 1) == [list(range(2, 64, 4))]
    assert crop_origins(224, 299, 224, 1) == [(0, 37)]
    assert crop_origins(298, 224, 224, 1) == [(37, 0)]


def test_spread_reaches_both_ends() -> None:
    for room in (0, 1, 59, 74, 174, 1000):
        for count in range(2, 12):
            places = spread(room, count)
            assert places[0] == 0
            # Float rounding may make the last one smaller by one, as in the official code.
            assert room - 1 <= places[-1] <= room
    assert spread(74, 10)[-1] == 74


def test_more_segment_clips_interleave_evenly() -> None:
    clips = segment_clips(96, 8, 4)
    assert sorted(frame for clip in clips for frame in clip) == list(range(0, 96, 3))


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (240, 320, (224, 298)),
        (1080, 1920, (224, 398)),
        (320, 240, (298, 224)),
        (224, 224, (224, 224)),
        (256, 340, (224, 297)),
        (1, 1, (224, 224)),
    ],
)
def test_longer_side_is_rounded_down(height: int, width: int, expected: tuple[int, int]) -> None:
    assert resize_shorter_side(torch.zeros(1, 3, height, width, dtype=torch.uint8), 224).shape[2:] == expected


def test_views_are_the_named_pixels_of_the_named_frames() -> None:
    clips_VCTHW = views_of(FakeVideo(30, 32, 57), DATA, 2, 3)
    assert (clips_VCTHW.shape, clips_VCTHW.dtype) == ((6, 3, 4, 32, 32), torch.uint8)
    starts = [(0, 0), (0, 12), (0, 25), (18, 0), (18, 12), (18, 25)]
    for clip_CTHW, (first, left) in zip(clips_VCTHW, starts, strict=True):
        for t in range(4):
            assert clip_CTHW[0, t].unique().tolist() == [first + 3 * t]
            assert torch.equal(clip_CTHW[1, t, :, 0], torch.arange(32, dtype=torch.uint8))
            assert torch.equal(clip_CTHW[2, t, 0], torch.arange(left, left + 32, dtype=torch.uint8))


def test_views_of_an_upright_video_follow_its_height() -> None:
    clips_VCTHW = views_of(FakeVideo(30, 57, 32), DATA, 1, 2)
    assert [int(clip[1, 0, 0, 0]) for clip in clips_VCTHW] == [0, 25]
    assert [int(clip[2, 0, 0, 0]) for clip in clips_VCTHW] == [0, 0]


def test_each_frame_is_decoded_once() -> None:
    video = FakeVideo(200, 32, 40)
    views_of(video, DATA, 25, 3)
    assert video.asked == sorted(set(video.asked))
    assert len(video.asked) > 32  # more than are decoded at once


def test_short_video_repeats_its_last_strided_frame() -> None:
    clips_VCTHW = views_of(FakeVideo(5, 32, 32), DATA, 2, 1)
    assert clips_VCTHW[:, 0, :, 0, 0].tolist() == [[0, 3, 3, 3]] * 2


def test_resized_frames_are_blurred_before_they_are_thinned() -> None:
    """At half the size, antialiasing turns stripes that are one pixel wide into grey."""

    class Stripes(FakeVideo):
        def read(self, indices: list[int]) -> np.ndarray:
            frames = np.zeros((len(indices), *self.shape, 3), dtype=np.uint8)
            frames[:, :, ::2] = 255
            return frames

    clips = views_of(Stripes(5, 96, 96), DATA, 1, 1).float()
    assert clips[..., 4:-4, 4:-4].sub(127.5).abs().max() < 64


def test_dataset_reports_unreadable_rows(demo_folder: Path, tmp_path: Path) -> None:
    rows = [VideoRow(tmp_path / "gone.mp4", 3), *read_list(demo_folder / "train.csv")[:1]]
    dataset = ViewDataset(rows, DATA, ViewsConfig(num_temporal=2, num_spatial=2))
    assert len(dataset) == 2
    bad, good = dataset[0], dataset[1]
    assert (bad.index, bad.label, bad.clips_VCTHW, bad.bad) == (0, 3, None, "no such file")
    assert good.clips_VCTHW is not None
    assert (good.index, good.label, good.bad) == (1, rows[1].label, None)
    assert good.clips_VCTHW.shape == (4, 3, 4, 32, 32)


def test_loader_yields_the_same_groups_from_any_number_of_workers(demo_folder: Path) -> None:
    rows = read_list(demo_folder / "train.csv")[:5]
    groups = [[4, 0, 1], [3]]
    loaded = []
    for workers in (0, 2):
        data = FinetuneDataConfig(num_frames=4, sampling_stride=3, image_size=32, num_workers=workers)
        loaded.append(list(make_view_loader(ViewDataset(rows, data, ViewsConfig()), groups, pin_memory=False)))
    assert [[row.index for row in group] for group in loaded[0]] == groups
    for alone, parallel in zip(loaded[0], loaded[1], strict=True):
        for one, other in zip(alone, parallel, strict=True):
            assert one.index == other.index
            assert one.clips_VCTHW is not None
            assert other.clips_VCTHW is not None
            assert torch.equal(one.clips_VCTHW, other.clips_VCTHW)


def test_broken_real_clips_are_reported_not_raised(real_clips: Path) -> None:
    files = sorted(path for path in (real_clips / "bad").iterdir() if path.suffix != ".csv")
    dataset = ViewDataset([VideoRow(path, 0) for path in files], DATA, ViewsConfig(num_temporal=2, num_spatial=3))
    for index in range(len(files)):
        row = dataset[index]
        assert (row.clips_VCTHW is None) == (row.bad is not None)
        if row.clips_VCTHW is not None:
            assert row.clips_VCTHW.shape == (6, 3, 4, 32, 32)
            Video(files[index])  # opens
