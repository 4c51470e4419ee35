from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from everest_ds.errors import UserError
from everest_ds.train.checkpoints.listing import (
    describe_strangers,
    find_outline_fault,
    list_checkpoints,
    sound_checkpoints,
    unfinished_saves,
)
from everest_ds.train.checkpoints.save import choose_checkpoint, prune_checkpoints, save_checkpoint
from tests.unit.train.checkpoints.test_save import ALONE, MODEL_STATES, SHARD, FakeEngine, names, state


def rewrite(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        path = checkpoint / name
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return damage


def overwrite(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / name).write_bytes(data) and None


def make_folder(name: str) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        (checkpoint / name).unlink()
        (checkpoint / name).mkdir()

    return damage


def without(*left_out: str) -> Callable[[Any], Any]:
    return lambda seal: {"files": {name: entry for name, entry in seal["files"].items() if name not in left_out}}


FAULTS: list[tuple[Callable[[Path], None], str]] = [
    (rewrite("complete.json", without("state.json")), "complete.json does not name state.json"),
    (rewrite("complete.json", without(MODEL_STATES)), f"complete.json does not name {MODEL_STATES}"),
    (rewrite("complete.json", without(SHARD)), f"complete.json does not name {SHARD}"),
    (rewrite("complete.json", lambda _: {"files": {}}), "complete.json does not name state.json"),
    (rewrite("complete.json", lambda _: []), "complete.json cannot be read"),
    (rewrite("complete.json", lambda _: {}), "complete.json cannot be read: it has no files"),
    (overwrite("complete.json", b'{"files": '), "complete.json cannot be read"),
    (overwrite("complete.json", b"\xff\xfe"), "complete.json cannot be read"),
    (overwrite("complete.json", b"\0" * 99), "complete.json cannot be read"),
    (overwrite("state.json", b""), "state.json cannot be read"),
    (overwrite("state.json", b"[" * 100_000), "state.json cannot be read"),
    (make_folder("state.json"), "state.json cannot be read: Is a directory"),
    (lambda folder: (folder / "state.json").unlink(), "state.json cannot be read: No such file"),
    (rewrite("state.json", lambda _: [1]), "state.json cannot be read"),
    (rewrite("state.json", lambda raw: raw | {"step": 7}), "its state.json is of step 7"),
    (rewrite("state.json", lambda raw: raw | {"step": "6"}), "state.json cannot be read: step='6'"),
    (rewrite("state.json", lambda raw: raw | {"step": True}), "state.json cannot be read: step=True"),
    (rewrite("state.json", lambda raw: raw | {"world_size": 2}), "zero_pp_rank_1_mp_rank_00_optim_states.pt"),
    (rewrite("state.json", lambda raw: raw | {"zero_stage": 3}), "zero_pp_rank_0_mp_rank_00_model_states.pt"),
]


@pytest.mark.parametrize(("damage", "message"), FAULTS)
def test_outline_that_is_wrong_is_passed_over_at_a_start_and_left_alone_later(
    damage: Callable[[Path], None], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [save_checkpoint(FakeEngine(), tmp_path, state(step), ALONE) for step in (2, 4, 6)]
    damage(folders[2])
    assert message in str(find_outline_fault(folders[2]))
    assert sound_checkpoints(tmp_path) == [folders[1], folders[0]]
    assert choose_checkpoint(list_checkpoints(tmp_path), ALONE, exact=False) == folders[1]
    assert f"warning: checkpoint {folders[2]} is damaged: " in capsys.readouterr().out
    assert message in str(describe_strangers(tmp_path))
    assert prune_checkpoints(tmp_path, keep_last=1) == [folders[0]]
    assert names(list_checkpoints(tmp_path)) == ["step-00000006", "step-00000004"]


STRANGERS = (
    "step-backup", "step-00000009 (copy)", "step-00000009.bak", "Step-00000009", "step-9", "step--0000009",
    "step-٠٠٠٠٠٠٠٩", "tmp-step-x", "tmp-", "damaged-", "universal-x", "nested", "step-000000090.tar", "odd-latest",
)  # fmt: skip


@pytest.mark.parametrize("name", STRANGERS)
def test_folder_of_another_name_does_no_harm(name: str, tmp_path: Path) -> None:
    own = save_checkpoint(FakeEngine(), tmp_path, state(5), ALONE)
    stranger = own.with_name(name)
    shutil.copytree(own, stranger)
    assert list_checkpoints(tmp_path) == [own]
    assert unfinished_saves(tmp_path) == []
    assert f"are left alone: {name}" in str(describe_strangers(tmp_path))
    newer = save_checkpoint(FakeEngine(), tmp_path, state(6), ALONE)
    assert prune_checkpoints(tmp_path, keep_last=1) == [own]
    assert list_checkpoints(tmp_path) == [newer]
    assert sorted(path.name for path in stranger.iterdir()) == sorted(path.name for path in newer.iterdir())


def test_what_has_the_name_of_the_next_save_is_set_aside(tmp_path: Path) -> None:
    """Links to other folders, which must stay, files, and a folder that no save has begun."""
    own = save_checkpoint(FakeEngine(), tmp_path, state(5), ALONE)
    folder, other = own.parent, tmp_path / "other"
    shutil.copytree(own, other)
    (folder / "step-00000006").write_text("file")
    (folder / "step-00000007").symlink_to(other)
    (folder / "step-00000008").symlink_to("nowhere")
    (folder / "step-00000009").mkdir()
    (folder / "step-00000009" / "mine").write_text("mine")
    for step in (6, 7, 8, 9):
        (folder / f"tmp-step-0000000{step}").write_text("file")
        save_checkpoint(FakeEngine(), tmp_path, state(step), ALONE)
    assert names(list_checkpoints(tmp_path)) == [f"step-0000000{step}" for step in (9, 8, 7, 6, 5)]
    assert len(list(other.iterdir())) == 4
    assert (folder / "odd-step-00000006").read_text() == (folder / "odd-tmp-step-00000006").read_text() == "file"
    assert (folder / "odd-step-00000007").readlink() == other
    assert (folder / "odd-step-00000008").is_symlink()
    assert (folder / "odd-step-00000009" / "mine").read_text() == "mine"


def test_steps_are_ordered_by_number(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000, 5):
        save_checkpoint(FakeEngine(), tmp_path, state(step), ALONE)
    assert names(list_checkpoints(tmp_path)) == ["step-100000000", "step-99999999", "step-00000005"]


def test_folder_of_checkpoints_that_cannot_be_read_is_no_fresh_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(FakeEngine(), tmp_path, state(5), ALONE)

    def refuse(self: Path) -> Any:
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(UserError, match="checkpoints cannot be read: Permission denied"):
        list_checkpoints(tmp_path)


def test_checkpoint_that_does_not_let_itself_be_looked_into_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older, newer = (save_checkpoint(FakeEngine(), tmp_path, state(step), ALONE) for step in (4, 5))
    stat, read_text = Path.stat, Path.read_text

    def refuse(real: Any) -> Any:
        def call(self: Path, *arguments: Any, **options: Any) -> Any:
            if self.parent == newer:
                raise PermissionError(13, os.strerror(13))
            return real(self, *arguments, **options)

        return call

    monkeypatch.setattr(Path, "stat", refuse(stat))
    monkeypatch.setattr(Path, "read_text", refuse(read_text))
    assert list_checkpoints(tmp_path) == [newer, older]
    assert choose_checkpoint(list_checkpoints(tmp_path), ALONE, exact=False) == older


def test_removal_that_is_interrupted_is_finished_by_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (4, 5):
        save_checkpoint(FakeEngine(), tmp_path, state(step), ALONE)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        prune_checkpoints(tmp_path, keep_last=1)
    assert names(list_checkpoints(tmp_path)) == ["step-00000005"]
    assert names(unfinished_saves(tmp_path)) == ["tmp-removed-step-00000004"]
    save_checkpoint(FakeEngine(), tmp_path, state(6), ALONE)
    assert unfinished_saves(tmp_path) == []
