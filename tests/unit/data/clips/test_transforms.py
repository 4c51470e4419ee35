from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tvf

from everest_ds.data.clips.sampling import RandomStream, keyed_generator
from everest_ds.data.clips.transforms import (
    crop_frames,
    crop_offsets,
    draw_crop,
    multi_scale_crops,
    resize_crop,
    resize_crop_by_pil,
    resize_frames,
)
from tests.conftest import GOLDEN

SCALES = (1.0, 0.875, 0.75, 0.66)
# Antialiased resizing of uint8 tensors against PIL on the golden example; measured 1.
RESIZE_ATOL = 2


def test_crops_and_offsets_equal_official(golden_json: Callable[[str], Any]) -> None:
    cases = golden_json("multiscale_crop")["cases"]
    assert cases
    for case in cases:
        width, height = case["image_w"], case["image_h"]
        pairs = multi_scale_crops(width, height, case["input_size"], SCALES)
        assert [list(pair) for pair in pairs] == case["crop_pairs_w_h"]
        offsets = [[list(o) for o in crop_offsets(width, height, *pair)] for pair in pairs]
        assert offsets == case["offsets_per_pair"]


def test_resized_crop_equals_official_image() -> None:
    golden = np.load(GOLDEN / "multiscale_crop_image.npz")
    pair, offset = (int(value) for value in golden["chosen"])
    image = golden["image"]
    height, width = image.shape[:2]
    size = golden["output"].shape[0]
    crop = multi_scale_crops(width, height, size, SCALES)[pair]
    left, top = crop_offsets(width, height, *crop)[offset]
    crop_THWC = crop_frames(image[None], (left, top, *crop), mirror=False)
    for resize, atol in ((resize_crop, RESIZE_ATOL), (resize_crop_by_pil, 0)):
        clip = resize(crop_THWC, size)
        difference = clip[:, 0].permute(1, 2, 0).int() - torch.from_numpy(golden["output"].astype(np.int32))
        assert difference.abs().max() <= atol


def test_all_frames_get_the_same_crop_and_mirror() -> None:
    frame = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
    clip = resize_crop(crop_frames(np.stack([frame, frame]), (2, 1, 4, 4), mirror=True), 4)
    assert clip.dtype == torch.uint8
    expected = torch.from_numpy(frame[1:5, 2:6][:, ::-1].copy()).permute(2, 0, 1)
    assert torch.equal(clip, torch.stack([expected, expected], dim=1))


def test_draws_reach_every_crop_and_stay_inside() -> None:
    seen = set()
    for index in range(3000):
        left, top, width, height = draw_crop(340, 256, 224, SCALES, keyed_generator(0, RandomStream.CROP, 0, index))
        assert 0 <= left <= 340 - width
        assert 0 <= top <= 256 - height
        seen.add((width, height))
    assert seen == set(multi_scale_crops(340, 256, 224, SCALES))


@pytest.mark.parametrize(("width", "height"), [(30, 40), (1, 1), (2, 500), (300, 223), (222, 222), (225, 400)])
def test_crop_of_a_small_frame_stays_inside(width: int, height: int) -> None:
    for index in range(200):
        generator = keyed_generator(0, RandomStream.CROP, 0, index)
        left, top, crop_width, crop_height = draw_crop(width, height, 224, SCALES, generator)
        assert 0 <= left <= width - crop_width
        assert 0 <= top <= height - crop_height


@pytest.mark.parametrize("shape", [(256, 340), (196, 196), (168, 224), (120, 90), (224, 224)])
def test_resized_crop_equals_pils_or_is_within_two_levels(shape: tuple[int, int]) -> None:
    """The oracle is PIL, frame by frame, shrinking and enlarging; measured worst difference: 1 on noise."""
    frames = np.random.default_rng(0).integers(0, 256, size=(3, *shape, 3), dtype=np.uint8)
    expected = [Image.fromarray(frame).resize((224, 224), Image.Resampling.BILINEAR) for frame in frames]
    expected_CTHW = torch.from_numpy(np.stack([np.asarray(image) for image in expected])).permute(3, 0, 1, 2)
    crop_THWC = crop_frames(frames, (0, 0, shape[1], shape[0]), mirror=False)
    assert torch.equal(resize_crop_by_pil(crop_THWC, 224), expected_CTHW)
    assert (resize_crop(crop_THWC, 224).int() - expected_CTHW.int()).abs().max() <= RESIZE_ATOL


@pytest.mark.parametrize("resize", [resize_crop, resize_crop_by_pil])
def test_mirroring_before_resizing_is_mirroring_after_it(
    resize: Callable[[torch.Tensor, int], torch.Tensor],
) -> None:
    frames = np.random.default_rng(1).integers(0, 256, size=(2, 150, 201, 3), dtype=np.uint8)
    for left, top, width, height in ((0, 0, 201, 150), (3, 9, 100, 141), (50, 0, 97, 64)):
        plain, mirrored = (
            crop_frames(frames, (left, top, width, height), mirror=mirror) for mirror in (False, True)
        )
        assert torch.equal(resize(mirrored, 112), resize(plain, 112).flip(-1))


@pytest.mark.parametrize("capability", [torch.backends.cpu.get_cpu_capability(), "DEFAULT"])
def test_resized_frames_are_torchvisions(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    random = torch.Generator().manual_seed(0)
    for height, width, size in [(30, 41, (16, 16)), (9, 7, (16, 24)), (240, 320, (224, 298)), (1, 1, (8, 8))]:
        frames_THWC = torch.randint(256, (3, height, width, 3), dtype=torch.uint8, generator=random)
        for frames_TCHW in (frames_THWC.permute(0, 3, 1, 2), frames_THWC.permute(0, 3, 1, 2).contiguous()):
            resized_TCHW = resize_frames(frames_TCHW, *size)
            assert torch.equal(resized_TCHW, tvf.resize(frames_TCHW, list(size), antialias=True))
            assert resized_TCHW.stride() == tvf.resize(frames_TCHW, list(size), antialias=True).stride()
