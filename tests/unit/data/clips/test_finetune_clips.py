from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from everest_ds.config import FinetuneDataConfig
from everest_ds.data.clips.augment import PairMixer
from everest_ds.data.clips.batch import MAX_REPLACEMENTS, Clip, ClipBatch, mix_pairs
from everest_ds.data.clips.cuts import FinetuneCut
from everest_ds.data.clips.dataset import ClipDataset, make_loader
from everest_ds.data.clips.sampling import GlobalBatchSampler, SampleKey
from everest_ds.data.lists.video_list import VideoRow, read_list
from everest_ds.data.readers.video import Video
from everest_ds.errors import UserError

EVERYTHING = FinetuneDataConfig(
    num_frames=8,
    sampling_stride=2,
    image_size=32,
    num_workers=0,
    rand_augment="rand-m7-n4-mstd0.5-inc1",
    erase_prob=0.5,
    mixup_alpha=0.8,
    cutmix_alpha=1.0,
    repeats=2,
)
# The demo's frames without augmentation.
PLAIN = FinetuneDataConfig(
    num_frames=8,
    sampling_stride=2,
    image_size=64,
    num_workers=0,
    flip=False,
    rand_augment=None,
    crop_area=(1.0, 1.0),
    crop_aspect=(1.0, 1.0),
)


def make_dataset(folder: Path, config: FinetuneDataConfig = EVERYTHING, *, seed: int = 0) -> ClipDataset:
    mixer = PairMixer.of(config, seed=seed, num_classes=8)
    return ClipDataset(read_list(folder / "train.csv"), FinetuneCut(config), seed=seed, noise_length=5, mixer=mixer)


def pixels(clip: Clip) -> Tensor:
    assert clip.pixels is not None
    return clip.pixels


def states() -> list[Any]:
    return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]  # type: ignore[index]


def test_sample_has_the_promised_shapes_and_depends_on_its_key_alone(demo_folder: Path) -> None:
    one, other = make_dataset(demo_folder), make_dataset(demo_folder)
    other[SampleKey(4, 11)]  # another history
    key = SampleKey(2, 9)
    clip = one[key]
    assert (pixels(clip).shape, pixels(clip).dtype) == ((3, 8, 32, 32), torch.uint8)
    assert (clip.noise_S.shape, clip.noise_S.dtype) == ((5,), np.float32)
    assert (clip.label, clip.index, clip.key, clip.bad) == (9 % 8, 9, key, ())
    assert torch.equal(pixels(clip), pixels(other[key]))
    assert np.array_equal(clip.noise_S, other[key].noise_S)
    changed = [replace(key, epoch=3), replace(key, repeat=1)]
    assert not any(torch.equal(pixels(clip), pixels(one[other_key])) for other_key in changed)
    assert not torch.equal(pixels(clip), pixels(make_dataset(demo_folder, seed=1)[key]))


def test_making_clips_leaves_the_training_process_its_own_draws(demo_folder: Path) -> None:
    dataset = make_dataset(demo_folder)
    dataset[SampleKey(0, 0)]  # first use imports libraries, and imports may draw
    before = states()
    dataset(tuple(SampleKey(0, index) for index in range(4)), {}, lambda _: None)
    assert states() == before


def whole_frames(demo_folder: Path, index: int, frame_idx: list[int]) -> Tensor:
    frames = Video(read_list(demo_folder / "train.csv")[index].path).read(frame_idx)
    return torch.from_numpy(frames).permute(3, 0, 1, 2)


def test_dense_clip_without_augmentation_is_the_frames_of_the_video(demo_folder: Path) -> None:
    dataset = make_dataset(demo_folder, replace(PLAIN, sampling_stride=4))  # all 32 frames: only one start
    expected = [min(int(step * 32 / 7), 31) for step in range(8)]
    for index in range(5):
        assert torch.equal(pixels(dataset[SampleKey(0, index)]), whole_frames(demo_folder, index, expected))


def test_segment_clip_takes_a_frame_of_each_part(demo_folder: Path) -> None:
    dataset = make_dataset(demo_folder, replace(PLAIN, sampling="segment"))
    offsets = set()
    for index in range(5):
        clip, frames = pixels(dataset[SampleKey(0, index)]), whole_frames(demo_folder, index, list(range(32)))
        for part in range(8):
            matches = [at for at in range(4) if torch.equal(clip[:, part], frames[:, 4 * part + at])]
            assert len(matches) == 1
            offsets.add(matches[0])
    assert offsets == {0, 1, 2, 3}


def test_clips_are_mirrored_half_of_the_time_and_never_with_flip_off(demo_folder: Path) -> None:
    plain, mirrored = (make_dataset(demo_folder, replace(PLAIN, keep_decoded=True, flip=f)) for f in (False, True))
    frames = whole_frames(demo_folder, 0, list(range(32)))
    flipped = 0
    for epoch in range(60):
        before, after = pixels(plain[SampleKey(epoch, 0)]), pixels(mirrored[SampleKey(epoch, 0)])
        assert any(torch.equal(before[:, 0], frames[:, at]) for at in range(32))
        if not torch.equal(before, after):
            assert torch.equal(before.flip(-1), after)
            flipped += 1
    assert 15 <= flipped <= 45  # false alarm once in 10,000 runs of 60 fair draws


def global_batches(
    folder: Path, *, world_size: int = 1, micro_size: int = 8, workers: int = 0
) -> list[list[dict[str, Any]]]:
    """Return the clips of each step's global batch, in order, over all ranks and workers."""
    dataset = make_dataset(folder, replace(EVERYTHING, num_workers=workers))
    per_rank = []
    for rank in range(world_size):
        sampler = GlobalBatchSampler(
            num_samples=len(dataset),
            global_size=8,
            micro_size=micro_size,
            rank=rank,
            world_size=world_size,
            seed=0,
            repeats=2,
            end_step=3,
        )
        per_rank.append(list(make_loader(dataset, sampler, micro_size=micro_size, pin_memory=False)))
    steps: list[list[dict[str, Any]]] = []
    accumulation = 8 // (micro_size * world_size)
    for step in range(3):
        steps.append([])
        for micro in range(step * accumulation, (step + 1) * accumulation):
            for rank in range(world_size):
                batch = per_rank[rank][micro]
                assert batch.target_BK is not None
                assert (batch.num_lost, batch.bad, len(batch.clips_BCTHW)) == (0, [], micro_size)
                names = ("clips_BCTHW", "noise_BS", "label_B", "index_B", "target_BK")
                steps[-1] += [
                    {name: getattr(batch, name)[row].tolist() for name in names} for row in range(micro_size)
                ]
    return steps


def test_mixed_global_batch_is_the_same_for_any_workers_micro_batches_and_processes(demo_folder: Path) -> None:
    expected = global_batches(demo_folder)
    for settings in (
        {"workers": 2, "micro_size": 4},
        {"world_size": 2, "micro_size": 2},
        {"world_size": 4, "micro_size": 2},
    ):
        assert global_batches(demo_folder, **settings) == expected, settings


def test_mixed_targets_hold_the_classes_of_neighbours(demo_folder: Path) -> None:
    for step in global_batches(demo_folder):
        for first, second in zip(step[::2], step[1::2], strict=True):
            assert first["index_B"] != second["index_B"]
            labels = {first["label_B"], second["label_B"]}
            for clip in (first, second):
                assert sum(clip["target_BK"]) == pytest.approx(1, abs=1e-6)
                assert {label for label, share in enumerate(clip["target_BK"]) if share} <= labels
            own = first["target_BK"][first["label_B"]]
            assert second["target_BK"][second["label_B"]] == pytest.approx(own, abs=1e-6)


def test_batch_without_mixing_has_no_soft_targets(demo_folder: Path) -> None:
    dataset = make_dataset(demo_folder, PLAIN)
    assert dataset.mixer is None
    batch = ClipBatch.collate(dataset((SampleKey(0, 0),), {}, lambda _: None))
    assert batch.target_BK is None


def test_clip_that_lost_its_neighbour_stays_unmixed(demo_folder: Path) -> None:
    dataset = make_dataset(demo_folder)
    good = [dataset[SampleKey(0, index)] for index in range(3)]
    lost = Clip.lost(SampleKey(0, 7))
    batch = ClipBatch.collate(mix_pairs([good[0], lost, good[1], good[2]], dataset.mixer))
    assert batch.target_BK is not None
    assert (batch.num_lost, batch.index_B.tolist()) == (1, [0, 1, 2])
    assert torch.equal(batch.clips_BCTHW[0], pixels(good[0]))
    assert batch.target_BK[0].tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
    whole = ClipBatch.collate(mix_pairs([good[1], good[2]], dataset.mixer))
    assert whole.target_BK is not None
    assert torch.equal(batch.clips_BCTHW[1:], whole.clips_BCTHW)
    assert torch.equal(batch.target_BK[1:], whole.target_BK)


def test_batch_that_is_lost_altogether_says_so(tmp_path: Path) -> None:
    mixer = PairMixer(seed=0, num_classes=8, mixup_alpha=0.8, cutmix_alpha=1.0)
    rows = [VideoRow(tmp_path / "gone.mp4", 0)]
    dataset = ClipDataset(rows, FinetuneCut(EVERYTHING), seed=0, noise_length=5, mixer=mixer)
    batch = ClipBatch.collate(dataset((SampleKey(0, 0), SampleKey(0, 0, 1)), {}, lambda _: None))
    assert (batch.num_lost, len(batch.bad), batch.target_BK) == (2, 2 * (MAX_REPLACEMENTS + 1), None)
    with pytest.raises(UserError, match=r"cannot be read.*no such file"):
        batch.require_whole()


def test_mixing_an_odd_number_of_clips_is_refused(demo_folder: Path) -> None:
    dataset = make_dataset(demo_folder)
    with pytest.raises(ValueError, match="3 clips do not make pairs"):
        dataset(tuple(SampleKey(0, index) for index in range(3)), {}, lambda _: None)


def test_bad_rand_augment_is_refused_when_the_cut_is_made() -> None:
    with pytest.raises(UserError, match=r"data\.rand_augment='rand-y3' is not in timm's notation"):
        FinetuneCut(replace(EVERYTHING, rand_augment="rand-y3"))


def test_frames_without_a_crop_count_as_unreadable(demo_folder: Path) -> None:
    """The aspect ratio of 1:10,000 makes the crop less than half a pixel wide."""
    narrow = replace(PLAIN, crop_aspect=(1e-4, 1e-4))
    clip = make_dataset(demo_folder, narrow)[SampleKey(0, 0)]
    assert clip.pixels is None
    assert clip.bad[0].reason == "its frames of 64x64 pixels are too small to crop"


def test_bad_and_odd_real_clips_are_cut_or_replaced(real_clips: Path, demo_folder: Path) -> None:
    good = read_list(demo_folder / "train.csv")
    suffixes = {".mp4", ".avi", ".mkv", ".webm", ".mov", ".ts"}
    files = sorted(path for path in real_clips.rglob("*") if path.suffix in suffixes)
    bad = [path for path in files if path.parent.name == "bad"]
    small = [path for path in files if path.name.startswith("derived__")]
    assert len(bad) == 28
    assert len(small) == 5
    for path in bad + small:
        dataset = ClipDataset([VideoRow(path, 0), *good], FinetuneCut(EVERYTHING), seed=0, noise_length=5)
        clip = dataset[SampleKey(0, 0)]
        assert pixels(clip).shape == (3, 8, 32, 32)
        assert all(sample.path == str(path) for sample in clip.bad)
        assert path in bad or not clip.bad
