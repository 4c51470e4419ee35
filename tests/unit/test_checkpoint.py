from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.train.checkpoint import (
    TrainState,
    find_checkpoint,
    load_checkpoint,
    read_state,
    save_checkpoint,
    verify_checkpoint,
)

ALONE = World(rank=0, local_rank=0, size=1, local_size=1)


class FakeEngine:
    """Writes one file as a shard; dies on request, as a killed process would."""

    device = torch.device("cpu")

    def __init__(self, *, dies: bool = False, loads: bool = True) -> None:
        self.dies = dies
        self.loads = loads
        self.loaded: str | None = None

    def save_checkpoint(self, folder: str, *, tag: str, save_latest: bool) -> None:
        assert not save_latest  # DeepSpeed would move its own pointer before the last barrier
        (Path(folder) / tag).mkdir()
        (Path(folder) / tag / "shard.pt").write_bytes(b"0123456789")
        if self.dies:
            raise KeyboardInterrupt

    def load_checkpoint(self, folder: str, *, tag: str) -> tuple[str | None, dict[str, Any]]:
        self.loaded = tag
        return (tag if self.loads else None), {}


def state(step: int, **changes: int) -> TrainState:
    return TrainState(
        **{"step": step, "epoch": 1, "samples": 32 * step, "world_size": 1, "zero_stage": 2, **changes}
    )


def test_saved_checkpoint_is_found_read_and_verified(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path) is None
    for step in (9, 10, 100):
        save_checkpoint(FakeEngine(), tmp_path, state(step), ALONE)
    newest = find_checkpoint(tmp_path)
    assert newest == tmp_path / "checkpoints" / "step-00000100"
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000100\n"
    assert read_state(newest) == state(100)
    verify_checkpoint(newest)
    engine = FakeEngine()
    load_checkpoint(engine, newest, state(100), world=ALONE, zero_stage=2)
    assert engine.loaded == "step-00000100"


def test_save_that_dies_leaves_the_previous_one_in_charge(tmp_path: Path) -> None:
    save_checkpoint(FakeEngine(), tmp_path, state(5), ALONE)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(FakeEngine(dies=True), tmp_path, state(6), ALONE)
    newest = find_checkpoint(tmp_path)
    assert newest is not None
    assert newest.name == "step-00000005"
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000005\n"
    save_checkpoint(FakeEngine(), tmp_path, state(6), ALONE)  # and the next try is not in its way
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-00000006"


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    for _ in range(2):
        folder = save_checkpoint(FakeEngine(), tmp_path, state(5), ALONE)
    verify_checkpoint(folder)
    assert [path.name for path in folder.parent.glob("*step-*")] == ["step-00000005"]


def damage_flip(folder: Path) -> None:
    (folder / "shard.pt").write_bytes(b"0123X56789")


def damage_cut(folder: Path) -> None:
    (folder / "shard.pt").write_bytes(b"01234")


def damage_remove(folder: Path) -> None:
    (folder / "shard.pt").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_flip, "the checksum of shard.pt differs"),
        (damage_cut, "shard.pt has 5 bytes, expected 10"),
        (damage_remove, "shard.pt is missing"),
    ],
)
def test_damage_is_found_before_deepspeed_opens_a_file(damage: Any, message: str, tmp_path: Path) -> None:
    folder = save_checkpoint(FakeEngine(), tmp_path, state(5), ALONE)
    damage(folder)
    engine = FakeEngine()
    with pytest.raises(UserError, match=message):
        load_checkpoint(engine, folder, state(5), world=ALONE, zero_stage=2)
    assert engine.loaded is None


@pytest.mark.parametrize("change", [{"world_size": 2}, {"zero_stage": 3}])
def test_another_world_or_stage_is_refused_with_both_numbers(change: dict[str, int], tmp_path: Path) -> None:
    folder = save_checkpoint(FakeEngine(), tmp_path, state(5, **change), ALONE)
    with pytest.raises(UserError, match="resume with the same numbers"):
        load_checkpoint(FakeEngine(), folder, state(5, **change), world=ALONE, zero_stage=2)


def test_load_that_does_nothing_is_an_error(tmp_path: Path) -> None:
    folder = save_checkpoint(FakeEngine(), tmp_path, state(5), ALONE)
    with pytest.raises(UserError, match="did not load"):
        load_checkpoint(FakeEngine(loads=False), folder, state(5), world=ALONE, zero_stage=2)


def test_folder_without_a_seal_is_no_checkpoint(tmp_path: Path) -> None:
    folder = save_checkpoint(FakeEngine(), tmp_path, state(5), ALONE)
    assert set(json.loads((folder / "complete.json").read_text())["files"]) == {"shard.pt", "state.json"}
    (folder / "complete.json").unlink()
    assert find_checkpoint(tmp_path) is None
    with pytest.raises(UserError, match="no complete checkpoint"):
        read_state(folder)
