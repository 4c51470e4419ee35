from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from everest_ds.config import PretrainDataConfig
from everest_ds.data.cuts import PretrainCut
from everest_ds.data.dataset import MAX_REPLACEMENTS, Clip, ClipBatch, ClipDataset, make_loader
from everest_ds.data.index import VideoRow, read_list
from everest_ds.data.sampling import GlobalBatchSampler, SampleKey
from everest_ds.errors import UserError

CONFIG = PretrainDataConfig(num_frames=8, sampling_stride=2, image_size=32, num_workers=0)


def make_dataset(folder: Path, *, seed: int = 0, config: PretrainDataConfig = CONFIG) -> ClipDataset:
    return ClipDataset(read_list(folder / "train.csv"), PretrainCut(config), seed=seed, noise_length=5)


def same(a: Clip, b: Clip) -> bool:
    assert a.clip_CTHW is not None
    assert b.clip_CTHW is not None
    return torch.equal(a.clip_CTHW, b.clip_CTHW)


def test_sample_has_the_promised_shapes(demo_folder: Path) -> None:
    clip = make_dataset(demo_folder)[SampleKey(0, 9)]
    assert clip.clip_CTHW is not None
    assert clip.noise_S is not None
    assert (clip.clip_CTHW.shape, clip.clip_CTHW.dtype) == ((3, 8, 32, 32), torch.uint8)
    assert (clip.noise_S.shape, clip.noise_S.dtype) == ((5,), torch.float32)
    assert 0 <= clip.noise_S.min() <= clip.noise_S.max() < 1
    assert (clip.label, clip.index, clip.bad) == (9 % 8, 9, ())


def test_sample_depends_on_its_key_alone(demo_folder: Path) -> None:
    one, other = make_dataset(demo_folder), make_dataset(demo_folder)
    other[SampleKey(4, 11)]  # another history
    key = SampleKey(2, 3)
    assert same(one[key], other[key])
    assert torch.equal(one[key].noise_S, other[key].noise_S)
    assert not same(one[key], one[replace(key, epoch=3)])
    assert not same(one[key], one[replace(key, repeat=1)])
    assert not same(one[key], make_dataset(demo_folder, seed=1)[key])


def test_clips_do_not_depend_on_the_number_of_workers(demo_folder: Path) -> None:
    batches = {}
    for workers in (0, 2):
        dataset = make_dataset(demo_folder, config=replace(CONFIG, num_workers=workers))
        sampler = GlobalBatchSampler(
            num_samples=len(dataset), global_size=8, micro_size=4, rank=1, world_size=2, seed=0, end_step=3
        )
        batches[workers] = list(make_loader(dataset, sampler, pin_memory=False))
    assert len(batches[0]) == 3
    for alone, parallel in zip(batches[0], batches[2], strict=True):
        assert torch.equal(alone.clips_BCTHW, parallel.clips_BCTHW)
        assert torch.equal(alone.noise_BS, parallel.noise_BS)
        assert torch.equal(alone.index_B, parallel.index_B)


def test_unreadable_video_is_replaced_and_named(demo_folder: Path) -> None:
    dataset = make_dataset(demo_folder)
    missing = demo_folder / "gone.mp4"
    dataset.rows = [VideoRow(missing, 0), *dataset.rows]
    clip = dataset[SampleKey(1, 0)]
    assert clip.clip_CTHW is not None
    (bad,) = clip.bad
    assert (bad.path, bad.reason, bad.epoch, bad.index) == (str(missing), "no such file", 1, 0)
    assert clip.index != 0
    assert clip.key == SampleKey(1, 0)
    assert same(clip, dataset[SampleKey(1, 0)])  # the replacement is drawn by key
    assert ClipBatch.collate([clip, clip]).bad == [bad, bad]


def test_videos_that_all_fail_are_an_error_of_the_batch(tmp_path: Path) -> None:
    dataset = ClipDataset([VideoRow(tmp_path / "gone.mp4", 0)], PretrainCut(CONFIG), seed=0, noise_length=5)
    batch = ClipBatch.collate([dataset[SampleKey(0, 0)]])
    assert len(batch.bad) == MAX_REPLACEMENTS + 1
    with pytest.raises(UserError, match=r"11 videos drawn one after another cannot be read.*no such file"):
        batch.require_whole()


def test_flip_mirrors_half_of_the_clips(demo_folder: Path) -> None:
    plain = make_dataset(demo_folder, config=replace(CONFIG, flip=False))
    mirrored = make_dataset(demo_folder, config=replace(CONFIG, flip=True))
    flipped = 0
    for index in range(60):
        before, after = plain[SampleKey(0, index)], mirrored[SampleKey(0, index)]
        assert before.clip_CTHW is not None
        assert after.clip_CTHW is not None
        if not torch.equal(before.clip_CTHW, after.clip_CTHW):
            assert torch.equal(before.clip_CTHW.flip(-1), after.clip_CTHW)
            flipped += 1
    assert 15 <= flipped <= 45  # 60 fair draws leave this range once in 10,000


def test_bad_real_clips_are_replaced_without_a_crash(real_clips: Path, demo_folder: Path) -> None:
    """Every broken file in turn, each beside readable ones: a clip comes out of each draw."""
    good = read_list(demo_folder / "train.csv")
    bad_files = sorted(path for path in (real_clips / "bad").iterdir() if path.suffix != ".csv")
    assert len(bad_files) == 28
    for path in bad_files:
        dataset = ClipDataset([VideoRow(path, 0), *good], PretrainCut(CONFIG), seed=0, noise_length=5)
        clip = dataset[SampleKey(0, 0)]
        assert clip.clip_CTHW is not None
        assert clip.clip_CTHW.shape == (3, 8, 32, 32)
        assert all(sample.path == str(path) for sample in clip.bad)
