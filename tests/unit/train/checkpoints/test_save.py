from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.train.checkpoints.listing import list_checkpoints, unfinished_saves
from everest_ds.train.checkpoints.save import (
    TrainState,
    choose_checkpoint,
    prune_checkpoints,
    read_state,
    require_same_start,
    save_checkpoint,
    set_aside,
)
from everest_ds.train.checkpoints.seal import find_damage
from everest_ds.train.checkpoints.shards import load_checkpoint

# Files that DeepSpeed writes on one rank at ZeRO-2.
MODEL_STATES, SHARD = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"
ALONE = World(rank=0, local_rank=0, size=1, local_size=1)


class FakeEngine:
    """Writes small files as shards; if ``dies``, it then fails as if the process was killed."""

    device = torch.device("cpu")
    module = torch.nn.Linear(2, 2)

    def __init__(self, *, dies: bool = False, loads: bool = True) -> None:
        self.dies = dies
        self.loads = loads
        self.loaded: str | None = None

    def save_checkpoint(self, folder: str, *, tag: str, save_latest: bool) -> None:
        assert not save_latest  # DeepSpeed would move its own pointer before the last barrier
        (Path(folder) / tag).mkdir()
        (Path(folder) / tag / MODEL_STATES).write_bytes(b"0123456789")
        (Path(folder) / tag / SHARD).write_bytes(b"0123456789")
        if self.dies:
            raise KeyboardInterrupt

    def load_checkpoint(self, folder: str, *, tag: str) -> tuple[str | None, dict[str, Any]]:
        self.loaded = tag
        return (tag if self.loads else None), {}


def state(step: int, **changes: int) -> TrainState:
    values = {"epoch": 1, "samples": 32 * step, "world_size": 1, "zero_stage": 2}
    return TrainState(step=step, dtype="float32", videos="9 videos, abc", **{**values, **changes})


def names(folders: list[Path]) -> list[str]:
    return [folder.name for folder in folders]


def test_saved_checkpoint_is_found_read_and_verified(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path) == []
    for step in (9, 10, 100):
        save_checkpoint(FakeEngine(), tmp_path, state(step, num_bad=step), ALONE)
    newest = list_checkpoints(tmp_path)[0]
    assert newest == tmp_path / "checkpoints" / "step-00000100"
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000100\n"
    assert read_state(newest) == state(100, num_bad=100)
    assert find_damage(newest, ALONE) is None
    engine = FakeEngine()
    load_checkpoint(engine, newest)
    assert engine.loaded == "step-00000100"


def test_save_that_dies_leaves_the_previous_one_in_charge(tmp_path: Path) -> None:
    save_checkpoint(FakeEngine(), tmp_path, state(5), ALONE)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(FakeEngine(dies=True), tmp_path, state(6), ALONE)
    assert names(list_checkpoints(tmp_path)) == ["step-00000005"]
    assert names(unfinished_saves(tmp_path)) == ["tmp-step-00000006"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000005\n"
    save_checkpoint(FakeEngine(), tmp_path, state(7), ALONE)  # the next save removes leftovers
    assert names(list_checkpoints(tmp_path)) == ["step-00000007", "step-00000005"]
    assert unfinished_saves(tmp_path) == []


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    for _ in range(2):
        folder = save_checkpoint(FakeEngine(), tmp_path, state(5), ALONE)
    assert find_damage(folder, ALONE) is None
    assert [path.name for path in folder.parent.glob("*step-*")] == ["step-00000005"]


def test_pruning_keeps_the_newest_and_the_milestones(tmp_path: Path) -> None:
    for step in range(2, 13, 2):
        save_checkpoint(FakeEngine(), tmp_path, state(step), ALONE)
    removed = prune_checkpoints(tmp_path, keep_last=2, keep_every_steps=4)
    assert names(removed) == ["step-00000006", "step-00000002"]
    assert names(list_checkpoints(tmp_path)) == [f"step-{step:08d}" for step in (12, 10, 8, 4)]
    prune_checkpoints(tmp_path, keep_last=0)  # the newest complete one is never removed
    assert names(list_checkpoints(tmp_path)) == ["step-00000012"]


def test_ranks_share_the_checksums_and_every_file_is_checked_by_one(tmp_path: Path) -> None:
    folder = save_checkpoint(FakeEngine(), tmp_path, state(5), ALONE)
    damage_flip(folder)
    ranks = [World(rank=rank, local_rank=rank, size=3, local_size=3) for rank in range(3)]
    found = [find_damage(folder, rank) for rank in ranks]
    assert sorted(fault is not None for fault in found) == [False, False, True]


def damage_flip(folder: Path) -> None:
    (folder / SHARD).write_bytes(b"0123X56789")


def damage_cut(folder: Path) -> None:
    (folder / SHARD).write_bytes(b"01234")


def damage_remove(folder: Path) -> None:
    (folder / SHARD).unlink()


def damage_seal(folder: Path) -> None:
    (folder / "complete.json").write_text("")


DAMAGES = [
    (damage_flip, f"the checksum of {SHARD} differs"),
    (damage_cut, f"{SHARD} has 5 bytes, expected 10"),
    (damage_remove, f"{SHARD} is missing"),
    (damage_seal, "complete.json cannot be read"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damaged_checkpoint_is_named_and_passed_over(
    damage: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older = save_checkpoint(FakeEngine(), tmp_path, state(4), ALONE)
    newer = save_checkpoint(FakeEngine(), tmp_path, state(5), ALONE)
    damage(newer)
    assert choose_checkpoint(list_checkpoints(tmp_path), ALONE, exact=False) == older
    said = capsys.readouterr().out
    assert str(newer) in said
    assert message in said
    damage(older)
    with pytest.raises(UserError, match=r"step-00000005.*step-00000004.*start afresh"):
        choose_checkpoint(list_checkpoints(tmp_path), ALONE, exact=False)


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damage_of_the_named_checkpoint_is_an_error(damage: Any, message: str, tmp_path: Path) -> None:
    folder = save_checkpoint(FakeEngine(), tmp_path, state(5), ALONE)
    damage(folder)
    with pytest.raises(UserError, match=message):
        choose_checkpoint([folder], ALONE, exact=True)


def test_nothing_to_choose_from_is_a_fresh_start() -> None:
    assert choose_checkpoint([], ALONE, exact=False) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "bfloat16"}, r"written in bfloat16, but this run computes in float32; change --precision"),
        ({"autocast": True}, r"with matmuls in bfloat16, but this run computes in float32; change --prec"),
        ({"videos": "8 videos, def"}, r"another training list \(8 videos, def, now 9 videos, abc\)"),
    ],
)
def test_other_circumstances_are_refused_with_both_values(change: dict[str, Any], message: str) -> None:
    folder = Path("run/checkpoints/step-00000005")
    require_same_start(folder, state(5), state(0))
    with pytest.raises(UserError, match=message):
        require_same_start(folder, replace(state(5), **change), state(0))


def test_load_that_does_nothing_or_fails_is_an_error(tmp_path: Path) -> None:
    folder = save_checkpoint(FakeEngine(), tmp_path, state(5), ALONE)
    with pytest.raises(UserError, match="did not load"):
        load_checkpoint(FakeEngine(loads=False), folder)
    broken = FakeEngine()
    broken.load_checkpoint = None  # type: ignore[assignment,method-assign]
    with pytest.raises(UserError, match=r"did not load.*TypeError"):
        load_checkpoint(broken, folder)


def test_damaged_checkpoint_set_aside_does_not_count_as_the_newest(tmp_path: Path) -> None:
    """Otherwise pruning would keep the damaged checkpoint and remove the one just saved."""
    older = save_checkpoint(FakeEngine(), tmp_path, state(10), ALONE)
    newer = save_checkpoint(FakeEngine(), tmp_path, state(12), ALONE)
    damage_flip(newer)
    set_aside([newer])
    assert list_checkpoints(tmp_path) == [older]
    saved = save_checkpoint(FakeEngine(), tmp_path, state(11), ALONE)
    prune_checkpoints(tmp_path, keep_last=1)
    assert list_checkpoints(tmp_path) == [saved]
    assert (newer.parent / "damaged-step-00000012").is_dir()


def test_folder_without_a_seal_is_no_checkpoint(tmp_path: Path) -> None:
    folder = save_checkpoint(FakeEngine(), tmp_path, state(5), ALONE)
    assert set(json.loads((folder / "complete.json").read_text())["files"]) == {MODEL_STATES, SHARD, "state.json"}
    (folder / "complete.json").unlink()
    assert list_checkpoints(tmp_path) == []
    assert unfinished_saves(tmp_path) == [folder]
    with pytest.raises(UserError, match="not a complete checkpoint"):
        read_state(folder)


def test_state_of_another_version_is_refused_by_name(tmp_path: Path) -> None:
    folder = save_checkpoint(FakeEngine(), tmp_path, state(5), ALONE)
    raw = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**raw, "shards_of_the_future": 1}))
    with pytest.raises(
        UserError, match=r"state.json cannot be read, or is another version's.*shards_of_the_future"
    ):
        read_state(folder)
