from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from everest_ds.config import FinetuneDataConfig, PretrainDataConfig
from everest_ds.data.clips.augment import PairMixer
from everest_ds.data.clips.batch import MAX_REPLACEMENTS, Clip, ClipBatch, mix_pairs
from everest_ds.data.clips.cuts import Cut, FinetuneCut, PretrainCut
from everest_ds.data.clips.dataset import ClipDataset, make_loader
from everest_ds.data.clips.sampling import GlobalBatchSampler, SampleKey
from everest_ds.data.demo import encode_h264
from everest_ds.data.lists.video_list import VideoRow, read_list
from everest_ds.data.readers.video import DecodedVideo, Video
from everest_ds.errors import UserError

CONFIG = PretrainDataConfig(num_frames=8, sampling_stride=2, image_size=32, num_workers=0)
CUT = PretrainCut(CONFIG)
LEVELS_PER_FRAME = 3  # brightness step of the counting video
PIECE_LEVELS = 4  # largest change by codec and resizing; measured worst: 3


def make_dataset(folder: Path, *, seed: int = 0, config: PretrainDataConfig = CONFIG) -> ClipDataset:
    cut = PretrainCut(config)
    return ClipDataset(read_list(folder / "train.csv"), cut, seed=seed, noise_length=5)


@pytest.fixture(scope="module")
def counting_row(tmp_path_factory: pytest.TempPathFactory) -> VideoRow:
    """A video of a static gradient that brightens by three levels a frame: brightness gives the frame number."""
    slope_HW = np.add.outer(np.arange(64), np.arange(64)) // 4
    frames_THWC = slope_HW[None, :, :, None] + LEVELS_PER_FRAME * np.arange(60)[:, None, None, None]
    path = tmp_path_factory.mktemp("counting") / "counting.mp4"
    encode_h264(path, np.repeat(frames_THWC, 3, axis=3).astype(np.uint8))
    return VideoRow(path, 3)


def same(a: Clip, b: Clip) -> bool:
    assert a.pixels is not None
    assert b.pixels is not None
    return torch.equal(a.pixels, b.pixels)


def test_sample_has_the_promised_shapes(demo_folder: Path) -> None:
    clip = make_dataset(demo_folder)[SampleKey(0, 9)]
    assert clip.pixels is not None
    assert (clip.pixels.shape, clip.pixels.dtype) == ((3, 8, 32, 32), torch.uint8)
    assert (clip.noise_S.shape, clip.noise_S.dtype) == ((5,), np.float32)
    assert (clip.frames_T.shape, clip.frames_T.dtype) == ((8,), np.int64)
    assert 0 <= clip.noise_S.min() <= clip.noise_S.max() < 1
    assert (clip.label, clip.index, clip.bad) == (9 % 8, 9, ())


@pytest.mark.parametrize(
    "cut",
    [
        CUT,
        PretrainCut(replace(CONFIG, num_frames=12)),
        PretrainCut(replace(CONFIG, num_frames=40)),  # more than the video has at this stride
        FinetuneCut(FinetuneDataConfig(num_frames=8, sampling_stride=4, image_size=32, rand_augment=None)),
        FinetuneCut(FinetuneDataConfig(num_frames=8, sampling="segment", image_size=32, rand_augment=None)),
    ],
    ids=["clip", "candidates", "short", "dense", "segment"],
)
def test_frames_of_a_sample_are_those_that_its_clip_shows_through_one_crop(
    counting_row: VideoRow, cut: Cut
) -> None:
    dataset = ClipDataset([counting_row], cut, seed=0, noise_length=5)
    starts = set()
    for epoch in range(10):
        clip = dataset[SampleKey(epoch, 0)]
        assert clip.pixels is not None
        frames = clip.frames_T.tolist()
        starts.add(frames[0])
        assert clip.pixels.shape[1] == len(frames) == cut.config.num_frames
        assert frames == sorted(frames)
        level_T = clip.pixels.double().mean(dim=(0, 2, 3))
        shown = (level_T - level_T[0]) / LEVELS_PER_FRAME + frames[0]
        assert shown.round().tolist() == frames
        # With its brightness subtracted, every frame shows the same part of the gradient.
        pieces = clip.pixels.double() - LEVELS_PER_FRAME * torch.from_numpy(clip.frames_T)[:, None, None]
        assert (pieces - pieces[:, :1]).abs().max() <= PIECE_LEVELS
    assert len(starts) > 1 or len(frames) == 40


def test_batch_keeps_each_clips_frames_also_where_clips_are_lost_or_mixed(counting_row: VideoRow) -> None:
    dataset = ClipDataset([counting_row], CUT, seed=0, noise_length=5)
    first, second = (dataset[SampleKey(epoch, 0)] for epoch in (0, 1))
    lost = Clip.lost(SampleKey(2, 0))
    both = [first.frames_T.tolist(), second.frames_T.tolist()]
    assert both[0] != both[1]
    mixer = PairMixer(seed=0, num_classes=4, mixup_alpha=0.8, cutmix_alpha=1.0)
    for mix in (list, partial(mix_pairs, mixer=mixer)):
        assert ClipBatch.collate(mix([first, second])).frames_BT.tolist() == both
        assert ClipBatch.collate(mix([first, lost, lost, second])).frames_BT.tolist() == both
        nothing = ClipBatch.collate(mix([lost, lost]))
        assert (nothing.frames_BT.shape, nothing.frames_BT.dtype) == ((0,), torch.int64)


@pytest.mark.gpu
def test_pinned_batch_holds_the_same_in_pinned_memory(counting_row: VideoRow) -> None:
    dataset = ClipDataset([counting_row], CUT, seed=0, noise_length=5)
    mixer = PairMixer(seed=0, num_classes=4, mixup_alpha=0.8, cutmix_alpha=1.0)
    clips = mix_pairs([dataset[SampleKey(epoch, 0)] for epoch in (0, 1)], mixer)
    plain, pinned = ClipBatch.collate(clips), ClipBatch.collate(clips, pin=True)
    for name in ("clips_BCTHW", "frames_BT", "noise_BS", "label_B", "target_BK"):
        assert torch.equal(getattr(plain, name), getattr(pinned, name))
        assert getattr(pinned, name).is_pinned(), name


def test_sample_depends_on_its_key_alone(demo_folder: Path) -> None:
    one, other = make_dataset(demo_folder), make_dataset(demo_folder)
    other[SampleKey(4, 11)]  # another history
    key = SampleKey(2, 3)
    assert same(one[key], other[key])
    assert np.array_equal(one[key].noise_S, other[key].noise_S)
    assert not same(one[key], one[replace(key, epoch=3)])
    assert not same(one[key], one[replace(key, repeat=1)])
    assert not same(one[key], make_dataset(demo_folder, seed=1)[key])


def test_unreadable_video_is_replaced_and_named(demo_folder: Path) -> None:
    dataset = make_dataset(demo_folder)
    missing = demo_folder / "gone.mp4"
    dataset.rows = [VideoRow(missing, 0), *dataset.rows]
    clip = dataset[SampleKey(1, 0)]
    assert clip.pixels is not None
    (bad,) = clip.bad
    assert (bad.path, bad.reason, bad.epoch, bad.index) == (str(missing), "no such file", 1, 0)
    assert clip.index != 0
    assert clip.key == SampleKey(1, 0)
    assert same(clip, dataset[SampleKey(1, 0)])  # the replacement depends on the key
    assert ClipBatch.collate([clip, clip]).bad == [bad, bad]


def test_videos_that_all_fail_are_an_error_of_the_batch(tmp_path: Path) -> None:
    dataset = ClipDataset([VideoRow(tmp_path / "gone.mp4", 0)], CUT, seed=0, noise_length=5)
    batch = ClipBatch.collate([dataset[SampleKey(0, 0)]])
    assert len(batch.bad) == MAX_REPLACEMENTS + 1
    with pytest.raises(UserError, match=r"11 videos drawn in a row cannot be read.*no such file"):
        batch.require_whole()


def test_flip_mirrors_half_of_the_clips(demo_folder: Path) -> None:
    plain = make_dataset(demo_folder, config=replace(CONFIG, flip=False, keep_decoded=True))
    mirrored = make_dataset(demo_folder, config=replace(CONFIG, flip=True, keep_decoded=True))
    flipped = 0
    for number in range(60):
        key = SampleKey(number // 4, number % 4)
        before, after = plain[key], mirrored[key]
        assert before.pixels is not None
        assert after.pixels is not None
        if not torch.equal(before.pixels, after.pixels):
            assert torch.equal(before.pixels.flip(-1), after.pixels)
            flipped += 1
    assert 15 <= flipped <= 45  # false alarm once in 10,000 runs of 60 fair draws


def test_bad_real_clips_are_replaced_without_a_crash(real_clips: Path, demo_folder: Path) -> None:
    """Each broken file is put in a list with readable videos: every draw returns a clip."""
    good = read_list(demo_folder / "train.csv")
    bad_files = sorted(path for path in (real_clips / "bad").iterdir() if path.suffix != ".csv")
    assert len(bad_files) == 28
    for path in bad_files:
        dataset = ClipDataset([VideoRow(path, 0), *good], CUT, seed=0, noise_length=5)
        clip = dataset[SampleKey(0, 0)]
        assert clip.pixels is not None
        assert clip.pixels.shape == (3, 8, 32, 32)
        assert all(sample.path == str(path) for sample in clip.bad)


@pytest.mark.parametrize("workers", [0, 2])
def test_kept_frames_give_the_same_batches_and_each_video_is_opened_once(
    workers: int, demo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    original = DecodedVideo.__init__

    def count(self: DecodedVideo, video: Video, *, with_times: bool) -> None:
        opened.append(video.path)
        original(self, video, with_times=with_times)

    monkeypatch.setattr(DecodedVideo, "__init__", count)
    loaders = []
    for keep in (False, True):
        config = replace(CONFIG, num_workers=workers, keep_decoded=keep)
        rows = read_list(demo_folder / "train.csv")[:12]
        dataset = ClipDataset(rows, PretrainCut(config), seed=3, noise_length=4)
        sampler = GlobalBatchSampler(
            num_samples=12, global_size=4, micro_size=4, rank=0, world_size=1, seed=3, end_step=9
        )
        loaders.append(make_loader(dataset, sampler, micro_size=4, pin_memory=False))
    for plain, kept in zip(*loaders, strict=True):
        assert torch.equal(plain.clips_BCTHW, kept.clips_BCTHW)
        assert torch.equal(plain.noise_BS, kept.noise_BS)
        assert torch.equal(plain.index_B, kept.index_B)
    if not workers:
        assert len(opened) == len(set(opened)) == 12


def test_video_that_cannot_be_decoded_is_replaced_where_frames_are_kept_too(
    demo_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "torn.mp4").write_bytes((demo_folder / "train" / "00000.mp4").read_bytes()[:900])
    rows = [VideoRow(tmp_path / "torn.mp4", 0), *read_list(demo_folder / "train.csv")[:3]]
    config = replace(CONFIG, keep_decoded=True)
    dataset = ClipDataset(rows, PretrainCut(config), seed=0, noise_length=1)
    for epoch in range(2):
        clip = dataset[SampleKey(epoch, 0, 0)]
        assert Path(clip.bad[0].path).name == "torn.mp4"
        assert clip.pixels is not None


def test_default_reader_gives_the_clip_of_decords_own_frames(demo_folder: Path) -> None:
    """The oracle builds the clip from frames that decord itself reads at the dataset's frame numbers."""
    decord = pytest.importorskip("decord")
    config = replace(CONFIG, image_size=64, crop_scales=(1.0,), flip=False)
    dataset = make_dataset(demo_folder, config=config)
    for index in (0, 5, 77):
        clip = dataset[SampleKey(1, index)]
        frames = decord.VideoReader(str(dataset.rows[index].path), num_threads=1).get_batch(clip.frames_T.tolist())
        assert torch.equal(clip.pixels, torch.from_numpy(frames.asnumpy()).permute(3, 0, 1, 2))
