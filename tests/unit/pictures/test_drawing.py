"""The pixels that the drawing functions draw; oracles compute pixel by pixel."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from everest_ds.pictures.clip import BOTH, DROPPED, HIDDEN, SEEN, PicturedClip, TokenChoice
from everest_ds.pictures.clip_sheet import clip_bands, draw_clip
from everest_ds.pictures.colours import HEAT, INK, PREDICTED, VISIBLE, heat_colours
from everest_ds.pictures.frame_sheet import draw_frame_choice, paint_bar, paint_candidate
from everest_ds.pictures.moving import frame_seconds, moving_pictures, save_gif, save_mp4
from everest_ds.pictures.paint import DIM, HATCH_PX, TINT, fit_frames, paint_heat, paint_kept
from everest_ds.pictures.sheet import GAP, MARGIN, Band, draw_sheet, shorten, wrap
from everest_ds.tokens import TokenGrid

GRID = TokenGrid(time=2, rows=2, cols=3)
CELL = 12
# Projections of linear RGB onto the colours that people without red or green receptors can distinguish.
PROTANOPIA = np.array([[0.1124, 0.8876, 0.0], [0.1124, 0.8876, 0.0], [0.004, -0.004, 1.0]])
DEUTERANOPIA = np.array([[0.2928, 0.7072, 0.0], [0.2928, 0.7072, 0.0], [-0.0223, 0.0223, 1.0]])


def picture(**changed: object) -> PicturedClip:
    generator = np.random.default_rng(0)
    values: dict[str, object] = {
        "frames_THWC": generator.integers(0, 256, (4, 2 * CELL, 3 * CELL, 3), np.uint8),
        "grid": GRID,
        "importance_N": generator.random(12).astype(np.float32),
        "choices": (TokenChoice(label="rero", visible_S=np.array([0, 7]), predicted_R=np.array([1, 11])),),
        "times_s": np.array([1.0, 1.25, 1.5, 1.75]),
    }
    return PicturedClip(**(values | changed))  # type: ignore[arg-type]


def linear(colour: tuple[int, int, int]) -> np.ndarray:
    return (np.array(colour) / 255) ** 2.2


@pytest.mark.parametrize("seen_as", [np.eye(3), PROTANOPIA, DEUTERANOPIA], ids=["all", "no red", "no green"])
def test_colours_differ_whatever_the_colour_vision(seen_as: np.ndarray) -> None:
    assert np.abs(seen_as @ (linear(VISIBLE) - linear(PREDICTED))).max() > 0.7  # measured: 0.817 at least
    lightness = [(seen_as @ linear(colour)) @ [0.2126, 0.7152, 0.0722] for colour in HEAT]
    assert np.diff(lightness).min() > 0.05  # measured: 0.062 at least


def test_heat_is_the_ramp_at_its_points_and_clipped_beyond() -> None:
    shares = np.array([-1, 0, 0.125, 0.25, 0.5, 0.75, 1, 2])
    middle = [round((a + b) / 2) for a, b in zip(HEAT[0], HEAT[1], strict=True)]
    expected = [HEAT[0], HEAT[0], middle, *HEAT[1:], HEAT[-1]]
    assert heat_colours(shares).tolist() == np.array(expected).tolist()


def test_heat_of_a_token_fills_its_cell() -> None:
    importance_N = np.arange(12, dtype=np.float32)
    tiles = paint_heat(importance_N, GRID, 5, (0.0, 11.0))
    assert tiles.shape == (2, 10, 15, 3)
    for n, (t, r, c) in enumerate(np.ndindex(2, 2, 3)):
        cell = tiles[t, 5 * r : 5 * r + 5, 5 * c : 5 * c + 5].reshape(-1, 3)
        assert (cell == heat_colours(np.array(n / 11))).all()


def is_outline(roles: np.ndarray, y: int, x: int) -> bool:
    """Return whether a pixel is within two pixels of a side of its token that borders on no visible token."""
    for dy, dx in ((-2, 0), (2, 0), (0, -2), (0, 2)):
        row, col = (y + dy) // CELL, (x + dx) // CELL
        inside = 0 <= row < roles.shape[0] and 0 <= col < roles.shape[1]
        if not (inside and roles[row, col] & SEEN):
            return True
    return False


def test_kept_tokens_are_marked_by_colour_and_pattern() -> None:
    roles = np.array([[[DROPPED, SEEN, HIDDEN], [BOTH, SEEN, SEEN]]], np.uint8)
    frame = np.random.default_rng(1).integers(0, 256, (1, 2 * CELL, 3 * CELL, 3), np.uint8)
    painted = paint_kept(frame, roles, CELL)[0]
    for y, x in np.ndindex(painted.shape[:2]):
        role, original = roles[0, y // CELL, x // CELL], frame[0, y, x].astype(float)
        expected = DIM * original @ [0.299, 0.587, 0.114] * np.ones(3)
        if role == HIDDEN:
            expected = (1 - TINT) * original + TINT * np.array(PREDICTED)
        if role & SEEN:
            expected = original
        if role & HIDDEN and (x + y) % HATCH_PX < 2:
            expected = np.array([PREDICTED, INK][(x + y) % HATCH_PX], float)
        if role & SEEN and is_outline(roles[0], y, x):
            expected = np.array(VISIBLE, float)
        assert np.abs(painted[y, x] - expected).max() <= 0.51, (y, x)


def test_frames_that_fit_stay_and_others_are_resized() -> None:
    frames = picture().frames_THWC
    assert fit_frames(frames, GRID, CELL) is frames
    assert fit_frames(frames, GRID, 8).shape == (4, 16, 24, 3)


def test_sheet_holds_the_tiles_of_each_band_in_balanced_blocks() -> None:
    tiles = np.random.default_rng(2).integers(0, 256, (10, 20, 90, 3), np.uint8)
    bands = [Band(title=name, tiles_THWC=tiles + i, captions=tuple("0123456789")) for i, name in enumerate("ab")]
    sheet = np.asarray(draw_sheet("title", ["a line"], bands, columns=8))
    found = []
    for shift in range(2):
        for tile in tiles + np.uint8(shift):
            (place,) = [
                (y, x)
                for y, x in np.argwhere((sheet == tile[0, 0]).all(axis=2))
                if np.array_equal(sheet[y : y + 20, x : x + 90], tile)
            ]
            found.append(place)
    columns = [(x - MARGIN) // (90 + GAP) for _, x in found]
    assert columns == [*range(5), *range(5)] * 2
    heights = [y for y, _ in found]
    assert heights[:5] < heights[10:15] < heights[5:10] < heights[15:]  # in each block, a is above b


def test_texts_fit_and_control_characters_do_not_reach_the_picture() -> None:
    assert shorten("short", 200) == "short"
    long = shorten("a" * 50 + "middle" + "z" * 50, 200)
    assert long.startswith("a") and long.endswith("z") and "…" in long
    assert wrap("one two three", 10_000) == ["one two three"]
    assert len(wrap("one two three four five six seven", 90)) > 2
    assert shorten("a\nb\x1b", 200) == r"a\nb\x1b"


def test_clip_bands_are_frames_importance_kept_and_reconstruction() -> None:
    rebuilt = np.random.default_rng(3).integers(0, 256, (4, 2 * CELL, 3 * CELL, 3), np.uint8)
    choice = TokenChoice(
        label="rero 0.3", visible_S=np.array([0, 7]), predicted_R=np.array([1, 11]), reconstruction_THWC=rebuilt,
        loss=0.5,
    )  # fmt: skip
    clip = picture(choices=(choice,))
    frames, heat, kept, reconstruction = clip_bands(clip, CELL)
    assert np.array_equal(frames.tiles_THWC, clip.frames_THWC[::2])
    assert frames.captions == ("1.00 s", "1.50 s")
    assert np.array_equal(heat.tiles_THWC, paint_heat(clip.importance_N, GRID, CELL, clip.heat_limits))  # type: ignore[arg-type]
    assert "2 visible + 2 predicted of 12 tokens (33.3% kept)" in kept.title
    assert kept.captions == ("1 + 1", "1 + 1")
    assert np.array_equal(reconstruction.tiles_THWC, rebuilt[::2])
    assert "original" in reconstruction.title and "0.500" in reconstruction.title
    assert draw_clip(clip, title="a clip", lines=["a line"]).width < 1440


def test_picture_of_frames_without_times_or_importance_names_frames() -> None:
    clip = picture(importance_N=None, times_s=None, numbers=np.array([4, 8, 12, 16]))
    frames, _ = clip_bands(clip, CELL)
    assert frames.captions == ("frame 4", "frame 12")
    assert draw_clip(clip, title="a clip").height > 0


@pytest.mark.parametrize(
    "changed",
    [
        {"frames_THWC": np.zeros((3, 24, 36, 3), np.uint8)},
        {"frames_THWC": np.zeros((4, 25, 36, 3), np.uint8)},
        {"frames_THWC": np.zeros((4, 24, 36, 3), np.float32)},
        {"importance_N": np.zeros(11, np.float32)},
        {"times_s": np.zeros(2)},
    ],
)
def test_arrays_that_do_not_fit_are_refused(changed: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected"):
        picture(**changed)


def test_kept_tokens_that_do_not_change_are_noted() -> None:
    """All tokens that change are kept, and one that does not change."""
    changes = np.zeros(12, np.float32)
    changes[[0, 7, 11]] = 1
    assert picture(importance_N=changes).count_still(picture().choices[0]) == 1  # position 1
    changes[5] = 1  # changes and is not kept
    assert picture(importance_N=changes).count_still(picture().choices[0]) == 0
    everything = TokenChoice(label="all", visible_S=np.arange(12), predicted_R=np.array([], np.int64))
    assert picture(importance_N=changes).count_still(everything) == 0
    cosine = np.array([-1.0, -0.5, -1.0, *[-1.0] * 9], np.float32)
    choice = TokenChoice(label="c", visible_S=np.array([0, 1]), predicted_R=np.array([2]))
    assert picture(importance_N=cosine, no_change=-1 + 1e-6).count_still(choice) == 2


def test_heat_of_a_still_clip_is_dark() -> None:
    clip = picture(importance_N=np.zeros(12, np.float32))
    assert (clip_bands(clip, CELL)[1].tiles_THWC == HEAT[0]).all()


def test_drawn_frames_are_sharp_and_framed_and_bars_are_shares_of_the_largest() -> None:
    frame = Image.fromarray(np.random.default_rng(4).integers(0, 256, (40, 60, 3), np.uint8))
    drawn, other = paint_candidate(frame, is_drawn=True), paint_candidate(frame, is_drawn=False)
    assert np.array_equal(drawn[3:-3, 3:-3], np.asarray(frame)[3:-3, 3:-3])
    assert (drawn[:3] == VISIBLE).all() and (drawn[:, -3:] == VISIBLE).all()
    assert other.astype(float).std() < 0.5 * np.asarray(frame).astype(float).std()
    counts = np.array([0, 5, 10])
    heights = [int((paint_bar(c, counts, 20)[:, 10] == VISIBLE).all(axis=1).sum()) for c in counts]
    assert heights == [0, 18, 36]


@pytest.mark.parametrize("counts", [[3, 0, 1], [0, 0, 0]], ids=["some change", "none"])
def test_frame_choice_is_drawn_for_any_counts(counts: list[int]) -> None:
    frames = np.zeros((6, 30, 30, 3), np.uint8)
    labels = [f"{i} s" for i in range(6)]
    sheet = draw_frame_choice(frames, np.array(counts), [0, 2], labels, title="t")
    framed = (np.asarray(sheet) == VISIBLE).all(axis=2)
    assert framed[:, MARGIN + 1].sum() >= 170 and framed[:, MARGIN + 2 * (170 + GAP) + 1].sum() >= 170
    assert framed[:, MARGIN + 170 + GAP + 1].sum() == 0


def test_moving_pictures_play_at_the_clips_own_pace(tmp_path: Path) -> None:
    clip = picture()
    images, seconds = moving_pictures(clip, title="a clip"), frame_seconds(clip)
    assert (len(images), seconds) == (4, 0.25)
    save_gif(images, seconds, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as gif:
        assert (gif.n_frames, gif.info["duration"], gif.info["loop"]) == (4, 250, 0)  # type: ignore[attr-defined]
    save_mp4(images, seconds, tmp_path / "a.mp4")
    with av.open(str(tmp_path / "a.mp4")) as video:
        assert video.streams.video[0].average_rate == 4
        decoded = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(decoded) == 4
    first = np.asarray(images[0]).astype(int)
    assert np.abs(decoded[0][: first.shape[0], : first.shape[1]] - first).mean() < 5


def test_clips_of_one_moment_play_at_a_fixed_pace() -> None:
    assert frame_seconds(picture(times_s=np.zeros(4))) == frame_seconds(picture(times_s=None)) == 0.125
