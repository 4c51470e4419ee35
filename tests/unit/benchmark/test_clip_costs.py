"""Time per clip and phase. All clocks are fakes."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from everest_ds.benchmark.clip_costs import (
    Costs,
    OfficialWay,
    OurWay,
    PhaseTimer,
    measure_round,
    official_clip,
    warm_up,
)
from everest_ds.config import FinetuneDataConfig, PretrainDataConfig
from everest_ds.data.clips.augment import PairMixer
from everest_ds.data.clips.cuts import Cut, FinetuneCut, PretrainCut
from everest_ds.data.clips.dataset import ClipDataset
from everest_ds.data.clips.sampling import SampleKey, sample_draws
from everest_ds.data.lists.video_list import VideoRow, read_list
from everest_ds.data.readers.video import Video, VideoReadError
from everest_ds.imagenet import IMAGENET_MEAN, IMAGENET_STD
from tests.unit.data.readers.video_files import shown, write_ramp

DATA = PretrainDataConfig(num_frames=8, sampling_stride=2, image_size=32, num_workers=0, reader="pyav")
CUT = PretrainCut(DATA)
FINE_CUT = FinetuneCut(
    FinetuneDataConfig(num_frames=8, sampling_stride=2, image_size=32, num_workers=0, reader="pyav", erase_prob=1.0)
)

# PIL rounds to bytes after each of its two passes, the oracle never rounds; worst difference seen: 1.00002 of 255.
PIL_TOLERANCE = 1.01


def ticks() -> partial[int]:
    """Return a clock that advances by one second at every reading."""
    return partial(next, itertools.count())


@dataclass
class SleepingWay:
    """A way that returns no clips; each phase advances the clock by given seconds per row."""

    name: str
    seconds: dict[str, float]
    clock: list[float]
    calls: list[tuple[str, tuple[int, ...]]]
    repeats: int = 1

    def make_batch(self, rows: Sequence[int], timer: PhaseTimer) -> Tensor:
        self.calls.append((self.name, tuple(rows)))
        for phase, seconds in self.seconds.items():
            with timer.phase(phase):  # type: ignore[arg-type]
                self.clock[0] += seconds * len(rows)
            self.clock[0] += 0.125  # outside of all phases: not counted
        return torch.empty(len(rows) * self.repeats)


def test_phases_add_up_by_clip_and_what_is_outside_of_them_counts_for_none() -> None:
    clock, calls = [0.0], []
    one = SleepingWay("one", {"open": 0.25, "decode": 2.0}, clock, calls)
    four = SleepingWay("four", {"open": 0.25, "decode": 2.0, "collate": 0.5}, clock, calls, repeats=4)
    spent = measure_round([one, four], range(6), now=lambda: clock[0])
    assert spent == [{"open": 250, "decode": 2000}, {"open": 62.5, "decode": 500, "collate": 125}]


def test_ways_are_interleaved_and_another_one_begins_each_round() -> None:
    calls: list[tuple[str, tuple[int, ...]]] = []
    ways = [SleepingWay(name, {}, [0.0], calls) for name in "abc"]
    measure_round(ways, [3, 5, 6, 8, 9], first=1)
    few, rest = (3, 5, 6, 8), (9,)
    assert calls == [("b", few), ("c", few), ("a", few), ("b", rest), ("c", rest), ("a", rest)]
    calls.clear()
    measure_round(ways, [0], first=5)
    assert [name for name, _ in calls] == ["c", "a", "b"]


def test_costs_are_medians_of_rounds_and_ratios_medians_of_each_rounds_ratio() -> None:
    ours = Costs([{"open": 1.0, "decode": d, "augment": 2.0, "collate": 1.0} for d in (7.0, 37.0, 9.0)])
    theirs = Costs([{"open": 1.0, "decode": d, "augment": 4.0} for d in (15.0, 45.0, 25.0)])
    assert [ours.phase_ms(phase) for phase in ("open", "decode", "collate", "copy")] == [1.0, 9.0, 1.0, None]
    assert ours.clip_ms == 12.0
    assert ours.clips_per_s_core == pytest.approx(1000 / 13)
    assert ours.ratio_to(theirs) == pytest.approx(statistics.median([10 / 20, 40 / 50, 12 / 30]))
    assert ours.ratio_to(theirs) != pytest.approx(ours.clip_ms / theirs.clip_ms)
    assert 12.0 < ours.clip_p90_ms <= 40.0
    with pytest.raises(ValueError, match="zip"):
        ours.ratio_to(Costs(theirs.rounds[:2]))


@pytest.fixture(scope="module")
def rows(demo_folder: Path) -> list[VideoRow]:
    return read_list(demo_folder / "train.csv")[:5]


def of(rows: Sequence[VideoRow], cut: Cut = CUT, mixer: PairMixer | None = None) -> ClipDataset:
    return ClipDataset(rows, cut, seed=3, noise_length=5, mixer=mixer)


@pytest.mark.parametrize("cut", [CUT, FINE_CUT], ids=["pretrain", "finetune"])
def test_our_way_makes_the_clips_of_a_run(cut: Cut, rows: list[VideoRow]) -> None:
    dataset = of(rows, cut)
    clips_BCTHW = OurWay(dataset).make_batch([0, 3], PhaseTimer())
    for clip_CTHW, row in zip(clips_BCTHW, (0, 3), strict=True):
        expected = dataset[SampleKey(0, row)].pixels
        assert expected is not None
        assert torch.equal(clip_CTHW, expected)


def test_repeats_are_crops_of_one_decode_and_each_phase_is_counted_once_for_what_it_does(
    rows: list[VideoRow],
) -> None:
    timer = PhaseTimer(ticks())
    clips_BCTHW = OurWay(of(rows), repeats=3).make_batch([1, 2], timer)
    assert timer.spent_s == {"open": 2, "decode": 2, "augment": 6, "collate": 1}
    video = Video(rows[1].path, reader="pyav")
    frames_THWC = video.read(CUT.choose_frames(video, sample_draws(3, SampleKey(0, 1))))
    expected = [CUT.clip(frames_THWC, sample_draws(3, SampleKey(0, 1, repeat))) for repeat in range(3)]
    assert torch.equal(clips_BCTHW[:3], torch.stack(expected))
    assert not torch.equal(clips_BCTHW[0], clips_BCTHW[1])


def test_lone_clip_is_mixed_with_itself_and_not_counted_twice(rows: list[VideoRow]) -> None:
    mixer = PairMixer(seed=3, num_classes=8, mixup_alpha=1.0, cutmix_alpha=0.0)
    plain, mixed = (OurWay(of(rows, FINE_CUT, m)).make_batch([0, 1, 2], PhaseTimer()) for m in (None, mixer))
    assert plain.shape == mixed.shape
    assert not torch.equal(plain[:2], mixed[:2])
    # A clip mixed with itself equals that clip up to the rounding of the two shares.
    assert (plain[2].int() - mixed[2].int()).abs().max() <= 1


def test_official_way_reads_the_frames_of_our_clip(tmp_path: Path) -> None:
    write_ramp(tmp_path / "ramp.mp4")
    ramp = [VideoRow(tmp_path / "ramp.mp4", 0)]
    data = replace(DATA, flip=False)
    cut = PretrainCut(data)
    timer = PhaseTimer(ticks())
    theirs_BCTHW = OfficialWay(ramp, cut, seed=3).make_batch([0, 0], timer)
    assert timer.spent_s == {"open": 2, "decode": 2, "augment": 2, "collate": 1}
    assert theirs_BCTHW.dtype == torch.float32
    ours_BCTHW = OurWay(of(ramp, cut)).make_batch([0], PhaseTimer())
    mean, std = (torch.tensor(values)[:, None, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    pixels_CTHW = (theirs_BCTHW[1] * std + mean) * 255
    assert shown(pixels_CTHW.permute(1, 2, 3, 0).numpy()) == shown(ours_BCTHW[0].permute(1, 2, 3, 0).numpy())


def triangle_weights(length: int, size: int) -> np.ndarray:
    """Return antialiased bilinear weights (output, input), computed from their definition."""
    scale = length / size
    reach = max(scale, 1.0)
    weights = np.zeros((size, length))
    for place in range(size):
        centre = (place + 0.5) * scale
        for source in range(length):
            weights[place, source] = max(0.0, 1 - abs(source + 0.5 - centre) / reach)
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("crop", [(3, 5, 60, 40), (0, 0, 96, 64), (10, 2, 20, 24), (7, 9, 32, 32)])
def test_official_clip_is_that_of_the_definition(crop: tuple[int, int, int, int]) -> None:
    frames_THWC = np.random.default_rng(0).integers(0, 256, (3, 64, 96, 3), dtype=np.uint8)
    left, top, width, height = crop
    cut = frames_THWC[:, top : top + height, left : left + width].astype(float)
    resized = np.einsum("yh,thwc,xw->ctyx", triangle_weights(height, 32), cut, triangle_weights(width, 32))
    clip_CTHW = official_clip(frames_THWC, crop, 32).double().numpy()
    assert clip_CTHW.shape == (3, 3, 32, 32)
    mean, std = (np.array(values)[:, None, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    off = np.abs((clip_CTHW * std + mean) * 255 - resized).max()
    assert off < (1e-3 if (width, height) == (32, 32) else PIL_TOLERANCE)


def test_rows_that_one_way_cannot_read_are_left_out_for_all_with_path_way_and_reason(
    rows: list[VideoRow], tmp_path: Path
) -> None:
    (tmp_path / "noise.mp4").write_bytes(b"no video at all" * 50)
    mixed = [VideoRow(tmp_path / "gone.mp4", 0), rows[0], VideoRow(tmp_path / "noise.mp4", 0), rows[1]]
    official = OfficialWay(mixed, CUT, seed=3)
    readable, left_out = warm_up([OurWay(of(mixed)), official], len(mixed))
    assert readable == [1, 3]
    assert [(bad.path.name, bad.way) for bad in left_out] == [("gone.mp4", "pyav"), ("noise.mp4", "pyav")]
    assert "no such file" in left_out[0].reason
    readable, left_out = warm_up([official], len(mixed))
    assert readable == [1, 3]
    assert all(bad.way == "official" and bad.reason for bad in left_out)


def test_frames_that_are_too_small_to_crop_are_left_out(tmp_path: Path) -> None:
    write_ramp(tmp_path / "ramp.mp4")
    tiny = PretrainCut(replace(DATA, crop_scales=(0.001,)))
    with pytest.raises(VideoReadError, match="96x64 pixels are too small to crop"):
        OurWay(of([VideoRow(tmp_path / "ramp.mp4", 0)], tiny)).make_batch([0], PhaseTimer())
