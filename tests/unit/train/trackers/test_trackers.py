"""Trackers: grouped names, one interface to four services, ids that survive a restart, harmless failures."""

from __future__ import annotations

import json
import sys
import tomllib
from dataclasses import asdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from everest_ds.config import TrackerName
from everest_ds.errors import UserError
from everest_ds.recipes import find_config
from everest_ds.train.record.metrics import MetricsLog
from everest_ds.train.trackers.base import (
    TUNED,
    TrackedRun,
    compared_settings,
    flat_settings,
    shown_scalars,
)
from everest_ds.train.trackers.group import SERVICES, Trackers, require_trackers
from everest_ds.train.trackers.tensorboard import show_scores, viewing_command
from tests.conftest import REPOSITORY

TRAIN_LINE = {
    "epoch": 0.5, "samples": 64, "loss": 0.9, "grad_norm": float("nan"), "lr": 1e-4, "clips_per_s": 10.0,
    "data_wait_ms": 3.0, "stalled": 0.01, "step_ms": 100.0, "memory_gib": 1.5, "mfu": None,
}  # fmt: skip
VAL_LINE = {
    "top1": 0.5,
    "best_top1": 0.6,
    "loss": 1.2,
    "is_best": False,
    "best_step": 4,
    "took_s": 1.5,
    "weights": "ema",
}
SETTINGS: dict[str, str | int | float | bool] = {
    "optim.base_lr": 1e-3, "recipe": "demo_ft", "task": "finetune", "data.flip": True,
}  # fmt: skip
PICTURE = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)


def opened(run_dir: Path, *names: TrackerName, start_step: int = 0) -> Trackers:
    run_dir.mkdir(exist_ok=True)
    trackers = Trackers(names)
    run = TrackedRun(
        run_dir=run_dir,
        settings=SETTINGS,
        compared=compared_settings(SETTINGS, {}, "float32"),
        start_step=start_step,
    )
    trackers.open(run, {"recipe": '{"task": "pretrain"}'})
    return trackers


class StandIn(ModuleType):
    """A fake service that records its calls and can fail from a given call on."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.broken: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: Any, **options: Any) -> Any:
            if name in self.broken:
                raise ConnectionError(f"no {name} today\nsecond line")
            self.calls.append((name, args, options))
            if name == "start_run":
                return SimpleNamespace(info=SimpleNamespace(run_id=options.get("run_id", "from-the-server")))
            return self if name == "init" else (name, *args)

        return call

    def named(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(args, options) for called, args, options in self.calls if called == name]


@pytest.fixture(params=["wandb", "trackio", "mlflow"])
def service(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    module = StandIn(request.param)
    monkeypatch.setitem(sys.modules, request.param, module)
    return module


def test_groups_put_what_is_looked_at_first_before_the_rest() -> None:
    names = shown_scalars("train", TRAIN_LINE) | shown_scalars("val", VAL_LINE)
    groups = sorted({name.split("/")[0] for name in [*names, "visual/confusion"]})
    assert groups == ["train", "val", "visual", "vitals"]
    first = sorted(name for name in names if name.startswith(("train/", "val/")))
    assert first == [
        "train/loss", "train/lr", "train/speed_clips_per_s", "train/stalled",
        "val/loss", "val/top1", "val/top1_best",
    ]  # fmt: skip
    assert shown_scalars("event", {"took_s": 1.0}) == {}
    assert shown_scalars("train", {"mfu": 0.4, "lr_min": 1e-6, "loss": float("inf")}) == {
        "train/mfu": 0.4,
        "vitals/lr_min": 1e-6,
    }


def test_settings_are_flat_and_of_kinds_that_every_service_takes() -> None:
    given = {
        "recipe": "demo",
        "optim": {"betas": (0.9, 0.95), "eps": 1e-8},
        "data": {"train_list": None, "flip": True},
    }
    assert flat_settings(given) == {
        "recipe": "demo", "optim.betas": "(0.9, 0.95)", "optim.eps": 1e-8, "data.train_list": "None",
        "data.flip": True,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["demo", "demo_ft"])
def test_runs_are_compared_by_few_columns_and_what_was_changed(name: str) -> None:
    recipe = flat_settings(asdict(find_config(name)))
    assert len(TUNED) <= 15
    of_run = recipe | {"optim.base_lr": 0.5, "data.flip": not recipe["data.flip"], "optim.betas": "(0.9, 0.9)"}
    of_run |= {"run.save_async": False, "data.train_list": "/somewhere/train.csv", "data.num_workers": 7}
    compared = compared_settings(of_run, recipe, "bfloat16")
    assert compared["changed"] == f"data.flip={of_run['data.flip']} optim.betas=(0.9, 0.9)"
    assert compared["optim.base_lr"] == 0.5 and compared["precision"] == "bfloat16"
    assert all(isinstance(value, str) is isinstance(TUNED[key], str) for key, value in compared.items())
    assert compared_settings(recipe, recipe, "float32")["changed"] == ""
    assert "changed" not in compared_settings(recipe, None, "float32")  # a recipe of another version


def test_tensorboard_has_curves_texts_settings_and_pictures_under_the_name_of_the_folder(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    older = run_dir / "tensorboard"
    older.mkdir(parents=True)
    (older / "events.out.tfevents.1.host").touch()  # of an earlier version
    for start_step, loss in ((0, 1.0), (1, 0.5)):
        log = MetricsLog(run_dir, start_step, trackers=opened(run_dir, "tensorboard", start_step=start_step))
        for step in range(start_step + 1, 4):
            log.write("train", step, loss=loss, mfu=None)
        log.write("event", 3, event="checkpoint", took_s=2.0)
        log.write("val", 3, top1=0.75, is_best=True)
        log.image("confusion", PICTURE, 3)
        log.close()
    assert not older.exists()
    board = EventAccumulator(str(run_dir), purge_orphaned_data=True).Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == [(1, 1.0), (2, 0.5), (3, 0.5)]
    tags = board.Tags()
    assert set(tags["scalars"]) == {"train/loss", "val/top1"}
    assert tags["images"] == ["visual/confusion"]
    assert (board.Images("visual/confusion")[0].width, board.Images("visual/confusion")[0].height) == (5, 4)
    assert board.SummaryMetadata("recipe/text_summary").plugin_data.plugin_name == "text"
    columns = board.PluginTagToContent("hparams")
    for part in (b"optim.base_lr", b"changed", b"data.flip=True"):
        assert part in columns["_hparams_/session_start_info"]
    for part in (b"val/top1", b"selection.visible_ratio"):  # columns that all runs share
        assert part in columns["_hparams_/experiment"]
    assert b"data.flip" not in columns["_hparams_/experiment"]
    layout = board.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    for part in (b"train/loss", b"val/top1", b"train/mfu", b"train/stalled", b"train/lr"):
        assert part in layout


def test_every_service_gets_numbers_texts_and_pictures_and_resumes_under_the_same_id(
    service: StandIn, tmp_path: Path
) -> None:
    name: Any = service.__name__
    for step in (1, 2):
        trackers = opened(tmp_path, name, start_step=step - 1)
        trackers.line("train", step, {"loss": 0.5, "note": "words"})
        trackers.image("clip", PICTURE, step)
        if step == 2:
            trackers.finish()
        trackers.close()
    if name == "mlflow":
        first, second = (options for _, options in service.named("start_run"))
        assert first == {"run_name": tmp_path.name}
        assert second == {"run_id": "from-the-server"}
        assert service.named("log_params") == [((SETTINGS,), {})]  # logged once: the service refuses changes
        assert service.named("log_metrics") == [(({"train/loss": 0.5},), {"step": step}) for step in (1, 2)]
        assert [args for args, _ in service.named("end_run")] == [("KILLED",), ("FINISHED",)]
        assert service.named("log_image")[0][1] == {"key": "visual/clip", "step": 1}
        used = "from-the-server"
    else:
        (_, first), (_, second) = service.named("init")
        key = {"wandb": "id", "trackio": "name"}[name]
        assert first == second
        assert first["resume"] == "allow"
        assert first["config"] == SETTINGS
        used = first[key]
        logged = [{**options, **args[0]} for args, options in service.named("log")]
        assert [one for one in logged if "train/loss" in one] == [
            {"train/loss": 0.5, "step": step} for step in (1, 2)
        ]
        assert [one["step"] for one in logged if "visual/clip" in one] == [1, 2]
        assert len(service.named("finish")) == 2
    assert json.loads((tmp_path / "trackers.json").read_text()) == {name: used}


def test_tracker_that_fails_while_training_is_reported_once_and_left_out(
    service: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name: Any = service.__name__
    trackers = opened(tmp_path, "tensorboard", name)
    service.broken = {"log", "log_metrics"}
    for step in (1, 2):
        trackers.line("train", step, {"loss": float(step)})
    trackers.close()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1
    assert said[0].startswith(f"warning: run.log_to={name} failed and is off from now on: ConnectionError: no log")
    board = EventAccumulator(str(tmp_path)).Reload()
    assert [event.value for event in board.Scalars("train/loss")] == [1.0, 2.0]


def test_tracker_that_does_not_open_is_the_users_fault_with_a_way_out(service: StandIn, tmp_path: Path) -> None:
    name: Any = service.__name__
    service.broken = {"init", "start_run"}
    with pytest.raises(
        UserError, match=rf"run.log_to={name} cannot be opened: ConnectionError: no .* leave {name} out"
    ):
        opened(tmp_path, name)


def test_missing_package_is_refused_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    require_trackers(["tensorboard"])
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("wandb", "trackio", "mlflow"):
        with pytest.raises(UserError) as refused:
            require_trackers([name])
        assert extras[name] == [SERVICES[name].requirement]  # type: ignore[index]
        assert f"pip install '{extras[name][0]}'" in str(refused.value)


def test_command_opens_the_neighbours_too_but_not_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert viewing_command(Path("runs/a")) == ["tensorboard", "--logdir", "runs"]
    assert viewing_command(Path("a")) == ["tensorboard", "--logdir", "a"]
    assert viewing_command(tmp_path.parent / "a") == ["tensorboard", "--logdir", str(tmp_path.parent / "a")]


def test_scores_of_an_evaluation_are_a_run_of_its_own_and_replace_earlier_ones(tmp_path: Path) -> None:
    picture_HWC = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    for top1 in (0.25, 0.5):
        show_scores(tmp_path / "evaluation-test", {"test/top1": top1}, picture_HWC, step=12)
    events = EventAccumulator(str(tmp_path / "evaluation-test")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("test/top1")] == [(12, 0.5)]
    (image,) = events.Images("test/confusion")
    assert (image.height, image.width) == (4, 6)
    assert list(tmp_path.glob("events.*")) == []
