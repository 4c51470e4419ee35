from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from everest_ds.data.sampling import Stream, keyed_generator
from everest_ds.data.transforms import crop_offsets, draw_crop, make_clip, multi_scale_crops
from tests.conftest import GOLDEN

SCALES = (1.0, 0.875, 0.75, 0.66)
# Antialiased uint8 tensors against PIL on the golden example: measured 1.
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
    clip = make_clip(image[None], (left, top, *crop), size, mirror=False)
    difference = clip[:, 0].permute(1, 2, 0).int() - torch.from_numpy(golden["output"].astype(np.int32))
    assert difference.abs().max() <= RESIZE_ATOL


def test_all_frames_get_the_same_crop_and_mirror() -> None:
    frame = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
    clip = make_clip(np.stack([frame, frame]), (2, 1, 4, 4), 4, mirror=True)
    assert clip.dtype == torch.uint8
    assert clip.is_contiguous()
    expected = torch.from_numpy(frame[1:5, 2:6][:, ::-1].copy()).permute(2, 0, 1)
    assert torch.equal(clip, torch.stack([expected, expected], dim=1))


def test_draws_reach_every_crop_and_stay_inside() -> None:
    seen = set()
    for index in range(3000):
        left, top, width, height = draw_crop(340, 256, 224, SCALES, keyed_generator(0, Stream.CROP, 0, index))
        assert 0 <= left <= 340 - width
        assert 0 <= top <= 256 - height
        seen.add((width, height))
    assert seen == set(multi_scale_crops(340, 256, 224, SCALES))


@pytest.mark.parametrize(("width", "height"), [(30, 40), (1, 1), (2, 500), (300, 223), (222, 222), (225, 400)])
def test_crop_of_a_small_frame_stays_inside(width: int, height: int) -> None:
    for index in range(200):
        generator = keyed_generator(0, Stream.CROP, 0, index)
        left, top, crop_width, crop_height = draw_crop(width, height, 224, SCALES, generator)
        assert 0 <= left <= width - crop_width
        assert 0 <= top <= height - crop_height
