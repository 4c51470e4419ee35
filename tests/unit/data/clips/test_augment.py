from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import RandomResizedCrop

from everest_ds.config import FinetuneDataConfig
from everest_ds.data.clips.augment import (
    PairMixer,
    check_rand_augment,
    draw_resized_crop,
    erase,
    rand_augment,
    seeded_globals,
)
from everest_ds.data.clips.sampling import RandomStream, SampleKey, keyed_generator
from everest_ds.errors import UserError

PAPER = "rand-m9-mstd0.5-inc1"
OFFICIAL = "rand-m7-n4-mstd0.5-inc1"
# Rounding of float32 shares that sum to one; measured 6e-8.
TARGET_ATOL = 1e-6


def generator(stream: RandomStream, index: int) -> np.random.Generator:
    return keyed_generator(0, stream, 0, index)


def states() -> list[Any]:
    name, keys, *rest = np.random.get_state()
    return [random.getstate(), name, keys.tolist(), rest, torch.get_rng_state().tolist()]  # type: ignore[union-attr]


def draws() -> list[float]:
    return [random.random(), random.gauss(0, 1), float(np.random.rand()), float(torch.rand(1))]


def test_seeded_globals_repeat_and_leave_no_trace() -> None:
    random.gauss(0, 1)  # random.gauss draws two values and keeps the second
    np.random.standard_normal()
    before = states()
    with seeded_globals(7):
        first = draws()
    assert states() == before
    with pytest.raises(KeyError), seeded_globals(7):
        assert draws() == first
        raise KeyError
    assert states() == before
    with seeded_globals(8):
        assert not set(draws()) & set(first)


def noise_frames(num_frames: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (num_frames, 24, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize("text", [PAPER, OFFICIAL, "rand-m5-mstd101-t3aw", "rand-p1-tweights", "rand"])
def test_all_frames_get_the_same_draw_of_rand_augment(text: str) -> None:
    frame = noise_frames(1)
    same, changed = np.repeat(frame, 4, axis=0), 0
    for index in range(40):
        out = rand_augment(same, text, generator(RandomStream.AUGMENT, index))
        assert (out.shape, out.dtype) == (same.shape, np.uint8)
        assert (out == out[:1]).all()
        changed += not (out[0] == frame[0]).all()
    assert changed >= 15  # measured: at least 24


@pytest.mark.parametrize("magnitude", ["m0", "m2", "m10", "m30-mmax30"])
@pytest.mark.parametrize("kind", ["inc0", "inc1", "tweights", "t3aw", "t3a"])
def test_rand_augment_survives_the_ends_of_its_scale(magnitude: str, kind: str) -> None:
    """At the end of its scale timm's Posterize asks for 0 bits, which Pillow refuses."""
    frame = np.full((1, 12, 12, 3), 200, dtype=np.uint8)
    for index in range(40):
        out = rand_augment(frame, f"rand-{magnitude}-n6-p1-{kind}", generator(RandomStream.AUGMENT, index))
        assert out.shape == frame.shape


def test_posterize_at_its_strongest_keeps_one_bit() -> None:
    from PIL import Image

    from everest_ds.data.clips.augment import _posterize, _rand_augment_transform

    (operation,) = [op for op in _rand_augment_transform("rand-m10-p1-inc1").ops if "Posterize" in op.name]
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.repeat(ramp[..., None], 3, axis=2))
    expected = np.where(ramp < 128, 0, 128)
    assert (np.asarray(operation(image))[..., 0] == expected).all()
    assert (np.asarray(_posterize(image, 3))[..., 1] == ramp // 32 * 32).all()
    assert (np.asarray(_posterize(image, 9)) == np.asarray(image)).all()


def test_rand_augment_of_a_frame_does_not_depend_on_the_others() -> None:
    frames = noise_frames(3)
    for index in range(20):
        together = rand_augment(frames, OFFICIAL, generator(RandomStream.AUGMENT, index))
        alone = [rand_augment(frame[None], OFFICIAL, generator(RandomStream.AUGMENT, index))[0] for frame in frames]
        assert (together == np.stack(alone)).all()


def levels(frame: NDArray[np.uint8], out: NDArray[np.uint8]) -> dict[int, int] | None:
    """Return the output level of each grey level, or None if a level has several outputs."""
    pairs = set(zip(frame.reshape(-1, 3)[:, 0].tolist(), out.reshape(-1, 3)[:, 0].tolist(), strict=True))
    return dict(pairs) if len({level for level, _ in pairs}) == len(pairs) else None


def test_rand_augment_maps_grey_levels_alike_in_frames_that_differ() -> None:
    """Two frames contain the same levels at different places: an operation must map the levels of both alike."""
    order = np.random.default_rng(1)
    frames = np.stack([order.permutation(np.repeat(np.arange(256, dtype=np.uint8), 2)) for _ in range(2)])
    frames_THWC = np.repeat(frames.reshape(2, 16, 32, 1), 3, axis=3)
    seen = set()
    for index in range(120):
        out = rand_augment(frames_THWC, "rand-m6-n1-p1-mstd2-inc1", generator(RandomStream.AUGMENT, index))
        first, second = (levels(frame, image) for frame, image in zip(frames_THWC, out, strict=True))
        assert first == second
        if first is not None:
            seen.add(tuple(sorted(first.items())))
    assert len(seen) >= 20


def test_rand_augment_moves_frames_alike_that_differ() -> None:
    """Two flat frames: after a move, the same pixels of both must show the filling colour."""
    frames = np.stack([np.full((40, 40, 3), level, dtype=np.uint8) for level in (200, 255)])
    moved = 0
    for index in range(80):
        out = rand_augment(frames, "rand-m6-n1-p1-inc1", generator(RandomStream.AUGMENT, index))[..., 0]
        first, second = (image != image[20, 20] for image in out)
        # After a small move, rounding may hide the filling in one of the frames; measured 0.012.
        assert (first != second).mean() <= 0.02
        moved += first.mean() > 0.04
    assert moved >= 15


def test_rand_augment_depends_on_the_key_and_leaves_no_trace() -> None:
    frames = noise_frames(2)
    before = states()
    outs = {rand_augment(frames, OFFICIAL, generator(RandomStream.AUGMENT, i)).tobytes() for i in (0, 1, 2, 0)}
    assert len(outs) == 3
    assert states() == before


@pytest.mark.parametrize(
    "text", [PAPER, OFFICIAL, "rand", "rand-m9-n3-p0.7-mmax12-inc0-t3a", "rand-mstd1-tweights"]
)
def test_timm_notation_is_accepted(text: str) -> None:
    check_rand_augment(text)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "must begin with 'rand'"),
        ("augmix-m3", "must begin with 'rand'"),
        ("m9-n2", "must begin with 'rand'"),
        ("rand-x9", "unknown part 'x9'"),
        ("rand-m", "unknown part 'm'"),
        ("rand-mnine", "unknown part 'mnine'"),
        ("rand-m7.5", "unknown part 'm7.5'"),
        ("rand-m9-", "unknown part ''"),
        ("rand-inc2", "unknown part 'inc2'"),
        ("rand-tall", "unknown part 'tall'"),
        ("rand-n40-tweights", "larger sample than population"),
    ],
)
def test_other_notation_is_refused_by_name(text: str, fault: str) -> None:
    with pytest.raises(UserError) as caught:
        check_rand_augment(text)
    assert str(caught.value).startswith(f"data.rand_augment={text!r} is not in timm's notation: ")
    assert fault in str(caught.value)


def test_resized_crops_keep_to_area_and_aspect() -> None:
    areas, aspects, lefts = [], [], []
    for index in range(1000):
        left, top, width, height = draw_resized_crop(
            2000, 1000, (0.1, 0.2), (0.5, 2.0), generator(RandomStream.CROP, index)
        )
        assert 0 <= left <= 2000 - width
        assert 0 <= top <= 1000 - height
        areas.append(width * height / 2_000_000)
        aspects.append(np.log2(width / height))
        lefts.append(left / (2000 - width))
    # Uniform draws, rounded to whole pixels. Means may be off by five standard errors.
    assert 0.0995 <= min(areas) <= 0.102
    assert 0.198 <= max(areas) <= 0.2005
    assert abs(np.mean(areas) - 0.15) < 5 * 0.1 / np.sqrt(12_000)
    assert -1.01 <= min(aspects) <= -0.98
    assert 0.98 <= max(aspects) <= 1.01
    assert abs(np.mean(aspects)) < 5 * 2 / np.sqrt(12_000)
    assert abs(np.mean(lefts) - 0.5) < 5 / np.sqrt(12_000)


@pytest.mark.parametrize(
    ("width", "height", "crop"),
    [(64, 64, (0, 0, 64, 64)), (400, 100, (133, 0, 133, 100)), (60, 200, (0, 60, 60, 80)), (1, 1, (0, 0, 1, 1))],
)
def test_whole_frame_or_its_middle_is_taken_where_nothing_else_fits(
    width: int, height: int, crop: tuple[int, int, int, int]
) -> None:
    aspect = (1.0, 1.0) if width == height else (0.75, 4 / 3)
    for index in range(20):
        assert draw_resized_crop(width, height, (1.0, 1.0), aspect, generator(RandomStream.CROP, index)) == crop


@pytest.mark.parametrize(("width", "height"), [(340, 256), (64, 200), (900, 100), (7, 5)])
def test_resized_crops_are_torchvisions(width: int, height: int) -> None:
    area, aspect = (0.08, 1.0), (0.75, 4 / 3)
    for index in range(200):
        crop = draw_resized_crop(width, height, area, aspect, generator(RandomStream.CROP, index))
        with seeded_globals(int(generator(RandomStream.CROP, index).integers(2**32))):
            top, left, *sides = RandomResizedCrop.get_params(
                torch.empty(3, height, width), list(area), list(aspect)
            )
        assert crop == (left, top, *sides[::-1])


def test_resized_crop_leaves_no_trace() -> None:
    before = states()
    crops = {
        draw_resized_crop(340, 256, (0.08, 1), (0.75, 4 / 3), generator(RandomStream.CROP, i)) for i in (0, 1, 2, 0)
    }
    assert len(crops) == 3
    assert states() == before


def test_erased_box_is_the_same_in_all_frames_and_the_rest_is_untouched() -> None:
    clip = torch.randint(0, 256, (3, 6, 40, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    kept = clip.clone()
    before = states()
    shares, noise = [], []
    for index in range(60):
        out = erase(clip, 1.0, generator(RandomStream.ERASE, index))
        assert (out.shape, out.dtype, out.is_contiguous()) == (clip.shape, torch.uint8, True)
        changed_CTHW = out != clip
        rows = changed_CTHW.any(dim=(0, 1, 3)).nonzero().flatten().tolist()
        cols = changed_CTHW.any(dim=(0, 1, 2)).nonzero().flatten().tolist()
        box = changed_CTHW[..., rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
        assert changed_CTHW.sum() == box.sum()
        # The whole box changes in every frame and channel. About 1 in 150 pixels gets the value that it had.
        assert (box.float().mean(dim=(2, 3)) > 0.8).all()
        shares.append(len(rows) * len(cols) / (40 * 48))
        noise.append(out[..., rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1].flatten(1).float())
        assert not torch.equal(out[:, 0][changed_CTHW.any(1)], out[:, 1][changed_CTHW.any(1)])
    assert torch.equal(clip, kept)
    assert states() == before
    assert 0.01 <= min(shares) <= 0.1
    assert 0.25 <= max(shares) <= 0.36
    # Normal noise, scaled by ImageNet's statistics; clamping to bytes reduces its deviation by 3 to 4 %.
    pixels = torch.cat(noise, dim=1)
    assert (pixels.mean(dim=1) - torch.tensor([0.485, 0.456, 0.406]) * 255).abs().max() < 1.5
    ratio = pixels.std(dim=1) / (torch.tensor([0.229, 0.224, 0.225]) * 255)
    assert ((ratio > 0.94) & (ratio < 1)).all()


def test_erasing_touches_the_share_of_clips_that_was_asked_for() -> None:
    clip = torch.zeros(3, 2, 16, 16, dtype=torch.uint8)
    erased = sum(not torch.equal(erase(clip, 0.25, generator(RandomStream.ERASE, i)), clip) for i in range(400))
    assert 60 <= erased <= 145  # false alarm once in 100,000 runs of 400 draws
    assert torch.equal(erase(clip, 0.0, generator(RandomStream.ERASE, 0)), clip)


def make_mixer(mixup_alpha: float, cutmix_alpha: float) -> PairMixer:
    return PairMixer(seed=0, num_classes=5, mixup_alpha=mixup_alpha, cutmix_alpha=cutmix_alpha)


def random_clips() -> tuple[Tensor, Tensor]:
    clips = torch.randint(0, 256, (2, 3, 4, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return clips[0], clips[1]


def test_cutmix_swaps_one_box_in_all_frames_and_shares_the_classes_by_its_area() -> None:
    first, second = random_clips()
    second = first ^ 128  # differs in every pixel
    kept, shares = first.clone(), []
    for index in range(60):
        mixed, target = make_mixer(0.0, 1.0).mix(first, second, (3, 1), SampleKey(0, index))
        assert (mixed.shape, mixed.dtype) == ((2, *first.shape), torch.uint8)
        swapped = mixed[0] != first
        assert torch.equal(mixed[0], torch.where(swapped, second, first))
        assert torch.equal(mixed[1], torch.where(swapped, first, second))
        assert torch.equal(swapped, swapped[:1, :1].expand_as(swapped))
        box = swapped[0, 0]
        assert box.sum() == box.any(0).sum() * box.any(1).sum()
        share = int(box.sum()) / (20 * 30)
        expected = torch.zeros(2, 5, dtype=torch.float64)
        expected[0, 3], expected[0, 1], expected[1, 1], expected[1, 3] = 1 - share, share, 1 - share, share
        assert target.dtype == torch.float32
        assert (target - expected).abs().max() <= TARGET_ATOL
        shares.append(share)
    assert torch.equal(first, kept)
    assert min(shares) < 0.1
    assert max(shares) > 0.5


def test_mixup_blends_pixels_and_classes_in_the_same_shares() -> None:
    first, second = random_clips()
    shares = []
    for index in range(60):
        mixed, target = make_mixer(0.8, 0.0).mix(first, second, (0, 4), SampleKey(0, index))
        share = float(target[0, 0])
        a, b = first.double(), second.double()
        for clip, row, weight in ((mixed[0], target[0], share), (mixed[1], target[1], 1 - share)):
            # Rounding to bytes, and float32 errors of up to 1e-4 at halves.
            assert (clip.double() - (a * weight + b * (1 - weight))).abs().max() <= 0.5 + 1e-3
            assert row.tolist() == pytest.approx([weight, 0, 0, 0, 1 - weight], abs=TARGET_ATOL)
        shares.append(share)
    assert min(shares) < 0.1
    assert max(shares) > 0.9


def test_mixed_classes_sum_to_one_also_where_both_clips_are_of_one() -> None:
    first, second = random_clips()
    for index in range(40):
        for labels in ((0, 4), (2, 2)):
            _, target = make_mixer(0.8, 1.0).mix(first, second, labels, SampleKey(0, index))
            assert (target.sum(1) - 1).abs().max() <= TARGET_ATOL
        assert (target[:, 2] - 1).abs().max() <= TARGET_ATOL


def test_both_ways_of_mixing_come_at_even_odds() -> None:
    first, second = (torch.full((3, 2, 16, 16), level, dtype=torch.uint8) for level in (0, 200))
    flat = 0
    for index in range(200):
        mixed, _ = make_mixer(1.0, 1.0).mix(first, second, (0, 1), SampleKey(0, index))
        flat += len(set(mixed[0].flatten().tolist()) - {0, 200}) > 0
    assert 65 <= flat <= 135  # mixup creates other levels; false alarm once in a million runs of 200 fair draws


def test_mixing_depends_on_the_key_and_leaves_no_trace() -> None:
    first, second = random_clips()
    before = states()
    keys = [SampleKey(0, 0), SampleKey(1, 0), SampleKey(0, 1), SampleKey(0, 0, 1), SampleKey(0, 0)]
    mixed = [make_mixer(0.8, 1.0).mix(first, second, (0, 1), key)[0] for key in keys]
    assert states() == before
    assert torch.equal(mixed[0], mixed[-1])
    assert len({clips.numpy().tobytes() for clips in mixed}) == 4


def test_configuration_that_mixes_nothing_has_no_mixer() -> None:
    assert PairMixer.of(FinetuneDataConfig(), seed=0, num_classes=5) is None
    mixer = PairMixer.of(FinetuneDataConfig(cutmix_alpha=1.0), seed=3, num_classes=5)
    assert mixer == PairMixer(seed=3, num_classes=5, mixup_alpha=0.0, cutmix_alpha=1.0)
