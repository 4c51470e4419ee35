"""Pictures of a run: when they are drawn, their content, and that training is not affected."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from everest_ds.config import FinetuneConfig, PretrainConfig
from everest_ds.data.clips.batch import ClipBatch
from everest_ds.data.lists.video_list import VideoRow
from everest_ds.distributed import World
from everest_ds.files import append_json_lines
from everest_ds.pictures.charts import draw_curves, draw_kept_by_step
from everest_ds.pictures.colours import PREDICTED, VISIBLE
from everest_ds.recipes import get_recipe
from everest_ds.train.record import pictures
from everest_ds.train.record.metrics import MetricsLog
from everest_ds.train.record.pictures import NUM_CLIPS, SHARE, Pace, Pictures, ShownClips
from everest_ds.train.tasks import Task, make_task

ALONE = World(rank=0, local_rank=0, size=1, local_size=1)
ROWS = [VideoRow(Path(f"{name}.mp4"), 0) for name in "abcd"]


def make_config(task: str = "pretrain", **selection: Any) -> PretrainConfig | FinetuneConfig:
    config: Any = get_recipe("demo" if task == "pretrain" else "demo_ft")
    data = {"num_classes": 3} if task == "finetune" else {}
    return replace(
        config,
        data=replace(config.data, num_frames=4, image_size=16, **data),
        model=replace(config.model, size="nano", patch_size=4),
        selection=replace(config.selection, **selection),
        run=replace(config.run, pictures_every_steps=10, log_every_steps=2),
    )


def make_batch(frames: int = 4, *, crops: bool = False) -> ClipBatch:
    generator = torch.Generator().manual_seed(3)
    clips = torch.randint(0, 256, (3, 3, frames, 16, 16), dtype=torch.uint8, generator=generator)
    cut = [clip.permute(1, 2, 3, 0).repeat_interleave(2, 1).repeat_interleave(2, 2) for clip in clips]
    return ClipBatch(
        clips_BCTHW=torch.empty(0) if crops else clips,
        frames_BT=torch.arange(frames).expand(3, -1),
        noise_BS=torch.zeros(3, 0),
        label_B=torch.zeros(3, dtype=torch.int64),
        index_B=torch.tensor([2, 0, 1]),
        crops=cut if crops else [],
    )


class Shown(MetricsLog):
    """Stores the images that it gets, by name and step."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir)
        self.images: dict[tuple[str, int], np.ndarray] = {}

    def image(self, name: str, pixels_HWC: np.ndarray, step: int) -> None:
        self.images[name, step] = pixels_HWC


def make(run_dir: Path, task: Task, **changed: Any) -> Pictures:
    world = changed.pop("world", ALONE)
    log = changed.pop("log", None) or MetricsLog(run_dir, is_main=world.is_main)
    given: dict[str, Any] = {"start_step": 0, "partitioned": False, "autocasts": False} | changed
    return Pictures(run_dir, task, ROWS, log, world=world, device=torch.device("cpu"), **given)


def drawn(run_dir: Path) -> list[str]:
    return sorted(str(path.relative_to(run_dir / "media")) for path in run_dir.rglob("*.png"))


def log_at(callback: Pictures, *steps: int) -> None:
    for step in steps:
        callback.on_log(step, {})


def test_pictures_are_due_at_the_first_step_and_after_each_multiple() -> None:
    pace = Pace(10)
    due = []
    for step in range(2, 40, 3):  # log steps that are not multiples of 10
        if pace.is_due(step):
            due.append(step)
            pace.passed(step)
    assert due == [2, 11, 20, 32]
    resumed = Pace(10, start_step=20)
    assert [step for step in (23, 29, 32) if resumed.is_due(step)] == [32]


def test_drawing_keeps_to_its_share_of_the_time_after_the_first_picture() -> None:
    """Steps take 0.1 s and pictures 0.5 s, so at most one picture per 50 s is drawn."""
    pace, when = Pace(1), []
    for step in range(1, 3001):
        if pace.can_afford(0.1 * step):
            when.append(0.1 * step)
            pace.spend(0.5)
    assert when[0] == 0.1
    assert all((number + 1) * 0.5 <= SHARE * at + 1e-9 for number, at in enumerate(when[1:], start=1))
    assert len(when) == 6  # 300 s allow 3 s of drawing


@pytest.mark.parametrize("crops", [False, True])
@pytest.mark.parametrize("task_name", ["pretrain", "finetune"])
def test_files_of_a_run(task_name: str, crops: bool, tmp_path: Path) -> None:
    task, shown = make_task(make_config(task_name)), Shown(tmp_path)
    callback = make(tmp_path, task, log=shown)
    callback.on_start()
    callback.on_batch(make_batch(crops=crops))
    log_at(callback, 2, 4)
    names = ["clip-1", "clip-2", "kept-by-step"]
    assert drawn(tmp_path) == [f"{name}/step-00000002.png" for name in names]
    append_json_lines(tmp_path / "metrics.jsonl", [{"kind": "train", "step": s, "loss": 1 / s} for s in (2, 4)])
    callback.on_end(4)
    assert "curves.png" in drawn(tmp_path)
    assert list(shown.images) == [*((name, step) for step in (2, 4) for name in names), ("curves", 4)]
    with Image.open(tmp_path / "media" / "clip-2" / "step-00000002.png") as stored:
        assert np.array_equal(np.asarray(stored), shown.images["clip-2", 2])
    assert all(pixels.dtype == np.uint8 and pixels.shape[2] == 3 for pixels in shown.images.values())


def test_a_start_that_takes_no_step_draws_no_clips(tmp_path: Path) -> None:
    task = make_task(make_config())
    first = make(tmp_path, task)
    first.on_batch(make_batch())
    again = make(tmp_path, task, start_step=4)
    again.on_start()
    again.on_end(4)
    assert drawn(tmp_path) == ["curves.png"]


def test_frame_selection_and_budgets_are_drawn(tmp_path: Path) -> None:
    config = make_config(alpha=2.0, budget="threshold")
    callback = make(tmp_path, make_task(config))
    callback.on_batch(make_batch(frames=8))
    log_at(callback, 2)
    assert len(drawn(tmp_path)) == 3


def test_weights_randomness_and_thresholds_stay_as_they_are(tmp_path: Path) -> None:
    task = make_task(make_config(budget="threshold"))
    before = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
    task.train()
    callback = make(tmp_path, task)
    callback.on_batch(make_batch())
    log_at(callback, 2)
    assert drawn(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # type: ignore[index, arg-type]
    assert all(torch.equal(before[name], tensor) for name, tensor in task.state_dict().items())
    assert task.training and task.threshold is None
    assert all(parameter.grad is None for parameter in task.parameters())


def test_a_resumed_run_draws_the_clips_of_the_first_start(tmp_path: Path) -> None:
    task = make_task(make_config())
    first = make(tmp_path, task)
    first.on_batch(make_batch())
    stored = ShownClips.load(tmp_path / "media" / "clips.npz")
    assert stored.names == ("c.mp4", "a.mp4") and len(stored.clips_BCTHW) == NUM_CLIPS
    assert np.array_equal(stored.clips_BCTHW, make_batch().clips_BCTHW[:NUM_CLIPS].numpy())
    other = make_batch()
    other.clips_BCTHW.zero_()
    second = make(tmp_path, task, start_step=4)
    second.on_start()
    second.on_batch(other)
    log_at(second, 6, 10)
    kept = ShownClips.load(tmp_path / "media" / "clips.npz")
    assert np.array_equal(kept.clips_BCTHW, stored.clips_BCTHW)
    assert {Path(name).name for name in drawn(tmp_path)} == {"step-00000010.png"}


@pytest.mark.parametrize("content", [b"", b"not a file of numpy", b"PK\x03\x04 torn"])
def test_clips_that_cannot_be_read_are_replaced(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "clips.npz").write_bytes(content)
    callback = make(tmp_path, make_task(make_config()))
    callback.on_start()
    assert capsys.readouterr().out.startswith("warning: ")
    callback.on_batch(make_batch())
    log_at(callback, 2)
    assert len(drawn(tmp_path)) == 3


def test_a_failing_picture_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*given: Any, **options: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(pictures, "draw_clip", fail)
    callback = make(tmp_path, make_task(make_config()))
    callback.on_batch(make_batch())
    log_at(callback, 2, 4, 10, 20)
    callback.on_end(20)
    (line,) = capsys.readouterr().out.splitlines()
    assert "No space left on device" in line and "training continues" in line
    assert drawn(tmp_path) == []


def test_clips_of_another_shape_are_one_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path, make_task(make_config())).on_batch(make_batch(frames=3))
    callback = make(tmp_path, make_task(make_config()))
    callback.on_start()
    log_at(callback, 2)
    assert capsys.readouterr().out.count("warning") == 1


def test_other_ranks_draw_nothing(tmp_path: Path) -> None:
    callback = make(tmp_path, make_task(make_config()), world=World(rank=1, local_rank=1, size=2, local_size=2))
    callback.on_start()
    callback.on_batch(make_batch())
    log_at(callback, 2)
    callback.on_end(2)
    assert not (tmp_path / "media").exists()


def test_bars_are_in_one_scale() -> None:
    chart = np.asarray(draw_kept_by_step(np.array([10.0, 0.0]), np.array([30.0, 20.0]), title="t"))
    columns = [chart[:, 12 + step * 62 + 5] for step in range(2)]
    seen, hidden = (
        [int((column == colour).all(axis=1).sum()) for column in columns] for colour in (VISIBLE, PREDICTED)
    )
    assert (seen, hidden) == ([40, 0], [120, 80])


def test_curves_leave_out_what_is_not_finite(tmp_path: Path) -> None:
    curves = {"loss": [(1, 2.0), (2, float("nan")), (3, 1.0)], "top-1": [], "lr": [(1, float("inf"))]}
    figure = draw_curves(curves, title="run")
    (axes,) = figure.axes
    assert axes.lines[0].get_xydata().tolist() == [[1, 2], [3, 1]]  # type: ignore[union-attr]
    figure.savefig(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.width > 600
    draw_curves({}, title="nothing yet").savefig(tmp_path / "b.png")
