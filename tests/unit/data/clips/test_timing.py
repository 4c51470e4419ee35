"""Clips sampled by time, at any frame rate, in training and scoring; the oracles loop over the frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from everest_ds.config import FinetuneDataConfig, PretrainDataConfig, ViewsConfig
from everest_ds.data.clips.cuts import FinetuneCut, PretrainCut
from everest_ds.data.clips.dataset import ClipDataset
from everest_ds.data.clips.sampling import RandomStream, SampleKey, keyed_generator
from everest_ds.data.clips.views import ViewDataset, timed_clips
from everest_ds.data.lists.video_list import VideoRow
from everest_ds.data.readers.timing import clip_room_s, frames_at, timed_indices
from everest_ds.errors import UserError
from tests.unit.data.readers.video_files import LEVELS_PER_FRAME, shown

SECONDS = 0.1
CONFIG = PretrainDataConfig(num_frames=6, sampling_seconds=SECONDS, image_size=32, num_workers=0, flip=False)
TOLERANCE_S = 1e-3  # rounding to the file's ticks


def write_at(path: Path, times_s: NDArray[np.float64], frame_of: Sequence[int] | None = None) -> Path:
    """Write flat frames that start at ``times_s``; each is five grey levels brighter than the previous one.

    With ``frame_of``, frame i is as bright as frame ``frame_of[i]`` would be.
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(30))
        stream.width, stream.height, stream.pix_fmt, stream.thread_count = 64, 48, "yuv420p", 1
        stream.bit_rate, stream.options = 4_000_000, {"bf": "0", "g": "8"}
        stream.codec_context.time_base = Fraction(1, 90_000)
        for index, time_s in enumerate(times_s):
            level = LEVELS_PER_FRAME * (index if frame_of is None else frame_of[index]) % 256
            image = np.full((48, 64, 3), level, dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = round(time_s * 90_000), Fraction(1, 90_000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def even_s(frames_per_s: float, length_s: float) -> NDArray[np.float64]:
    return np.arange(round(frames_per_s * length_s)) / frames_per_s


def uneven_s() -> NDArray[np.float64]:
    """Return the times of 48 frames: one second at 30 frames/s, one at 5, the rest at 12.5."""
    return np.cumsum([0.0, *[1 / 30] * 30, *[0.2] * 5, *[0.08] * 12])


def shown_at(times_s: NDArray[np.float64], moment_s: float) -> int:
    """Return the frame that is shown at a time, by a loop over all frames."""
    on_screen = 0
    for index, start_s in enumerate(times_s):
        if start_s <= moment_s + 6e-4:
            on_screen = index
    return on_screen


@given(
    steps=st.lists(st.floats(0.001, 2.0), max_size=40),
    length=st.integers(1, 20),
    seconds=st.floats(0.001, 3.0),
    start=st.floats(0.0, 5.0),
)
def test_frames_at_are_those_on_the_screen(steps: list[float], length: int, seconds: float, start: float) -> None:
    times_s = np.cumsum([0.0, *steps])
    expected = [shown_at(times_s, start + place * seconds) for place in range(length)]
    assert frames_at(times_s, length, seconds, start) == expected


@pytest.mark.parametrize(("frames_per_s", "stride"), [(25, 4), (30, 4), (60, 8), (10, 2)])
def test_frames_of_an_even_video_are_those_of_a_stride(frames_per_s: int, stride: int) -> None:
    times_s = even_s(frames_per_s, 10)
    for first in (0, 1, 7):
        found = frames_at(times_s, 16, stride / frames_per_s, first / frames_per_s)
        assert found == [min(first + stride * place, len(times_s) - 1) for place in range(16)]


def test_short_video_repeats_its_last_frame_and_a_single_one_is_all() -> None:
    generator = np.random.default_rng(0)
    assert timed_indices(even_s(10, 0.5), 8, 0.1, generator) == [0, 1, 2, 3, 4, 4, 4, 4]
    assert timed_indices(np.zeros(1), 3, 0.1, generator) == [0, 0, 0]
    assert clip_room_s(even_s(10, 0.5), 8, 0.1) == 0
    with pytest.raises(ValueError, match="at least one frame"):
        clip_room_s(np.zeros(0), 8, 0.1)


def test_starts_are_even_in_time_and_not_over_frames() -> None:
    """The first of three seconds has 30 of the 48 frames but only a third of the starts."""
    times_s, generator = uneven_s(), np.random.default_rng(0)
    starts = [timed_indices(times_s, 1, 0.1, generator)[0] for _ in range(3000)]
    room_s = times_s[-1]
    share = np.mean([start < 30 for start in starts])
    assert abs(share - 1 / room_s) < 5 * (1 / room_s * (1 - 1 / room_s) / 3000) ** 0.5


@pytest.mark.parametrize("reader", ["decord", "pyav"])
@pytest.mark.parametrize("keep", [False, True])
def test_clips_cover_the_same_time_at_any_frame_rate(reader: str, keep: bool, tmp_path: Path) -> None:
    times = {"slow": even_s(30, 1.5), "fast": even_s(60, 0.8), "uneven": uneven_s()}
    rows = [VideoRow(write_at(tmp_path / f"{name}.mp4", time_s), 0) for name, time_s in times.items()]
    config = replace(CONFIG, reader=reader, keep_decoded=keep)  # type: ignore[arg-type]
    dataset = ClipDataset(rows, PretrainCut(config), seed=0, noise_length=1)
    for index, times_s in enumerate(times.values()):
        for epoch in range(10):
            clip = dataset[SampleKey(epoch, index)]
            assert not clip.bad
            assert clip.pixels is not None
            share = keyed_generator(0, RandomStream.FRAMES, epoch, index).random()
            start_s = share * max(times_s[-1] - 5 * SECONDS, 0)
            expected = [shown_at(times_s, start_s + place * SECONDS) for place in range(6)]
            assert clip.frames_T.tolist() == expected
            levels = [frame * LEVELS_PER_FRAME % 256 / LEVELS_PER_FRAME for frame in expected]
            assert shown(clip.pixels.permute(1, 2, 3, 0).numpy()) == pytest.approx(levels, abs=1)


def test_clips_stay_in_their_window_and_candidates_are_in_time_too(tmp_path: Path) -> None:
    times_s = uneven_s()
    row = VideoRow(write_at(tmp_path / "a.mp4", times_s), 0, start_s=0.5, end_s=2.5)
    dataset = ClipDataset([row], PretrainCut(replace(CONFIG, num_frames=9)), seed=3, noise_length=1)
    inside = [index for index, time_s in enumerate(times_s) if 0.5 - TOLERANCE_S <= time_s < 2.5 - TOLERANCE_S]
    starts = set()
    for epoch in range(20):
        frames = dataset[SampleKey(epoch, 0)].frames_T
        assert len(frames) == 9
        assert max(frames) < len(inside)  # frame numbers start at the window's first frame
        seen_s = times_s[[inside[frame] for frame in frames]]
        assert seen_s[-1] - seen_s[0] == pytest.approx(8 * SECONDS, abs=0.2)  # duration of the longest frame
        starts.add(frames[0])
    assert len(starts) > 5


def test_repeats_share_their_frames_or_draw_their_own(tmp_path: Path) -> None:
    row = VideoRow(write_at(tmp_path / "a.mp4", even_s(30, 1.5)), 0)
    found = {}
    for kind in ("shared", "own"):
        config = replace(CONFIG, num_frames=2, repeats=3, repeat_frames=kind)  # type: ignore[arg-type]
        dataset = ClipDataset([row], PretrainCut(config), seed=0, noise_length=1)
        found[kind] = {tuple(dataset[SampleKey(0, 0, repeat)].frames_T) for repeat in range(3)}
    assert (len(found["shared"]), len(found["own"])) == (1, 3)


def test_fine_tuning_clips_are_in_time(tmp_path: Path) -> None:
    times_s = even_s(60, 0.8)
    row = VideoRow(write_at(tmp_path / "a.mp4", times_s), 0)
    config = FinetuneDataConfig(
        num_frames=4, sampling_seconds=SECONDS, image_size=32, num_workers=0, rand_augment=None
    )
    frames = ClipDataset([row], FinetuneCut(config), seed=0, noise_length=1)[SampleKey(0, 0)].frames_T
    assert np.diff(frames).tolist() == [6, 6, 6]


@pytest.mark.parametrize("num_clips", [1, 2, 5])
def test_views_are_spread_over_time(num_clips: int) -> None:
    times_s = uneven_s()
    room_s = times_s[-1] - 5 * SECONDS
    shares = [0.5] if num_clips == 1 else [k / (num_clips - 1) for k in range(num_clips)]
    expected = [[shown_at(times_s, share * room_s + place * SECONDS) for place in range(6)] for share in shares]
    clips = timed_clips(times_s, 6, SECONDS, num_clips)
    assert clips == expected
    assert num_clips == 1 or (clips[0][0], clips[-1][-1]) == (0, len(times_s) - 1)


def test_views_of_a_window_are_in_time(tmp_path: Path) -> None:
    row = VideoRow(write_at(tmp_path / "a.mp4", even_s(60, 0.8)), 0, start_s=0.1, end_s=0.7)
    data = FinetuneDataConfig(num_frames=3, sampling_seconds=SECONDS, image_size=32, num_workers=0)
    views = ViewDataset([row], data, ViewsConfig(num_temporal=2, num_spatial=1))[0].clips_VCTHW
    assert views is not None
    seen = [shown(view.permute(1, 2, 3, 0).numpy()) for view in views]
    assert seen[0] == [6, 12, 18]
    assert seen[1] == [29, 35, 41]  # the last frame that starts before 0.7 s is number 41


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_seconds_that_are_none_are_refused(value: float) -> None:
    for kind in (PretrainDataConfig, FinetuneDataConfig):
        with pytest.raises(UserError, match=r"data\.sampling_seconds=.* must be above 0"):
            kind(sampling_seconds=value)


def test_segments_are_of_the_whole_video_and_take_no_seconds() -> None:
    with pytest.raises(UserError, match=r"data\.sampling_seconds=0\.1 has no effect with data\.sampling=segment"):
        FinetuneDataConfig(sampling_seconds=0.1, sampling="segment")
