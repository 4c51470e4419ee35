from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from everest_ds import processes
from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.train.checkpoints import owner as owners
from everest_ds.train.checkpoints.owner import Owner
from everest_ds.train.checkpoints.save import Keeping, TrainState, bytes_of_rank
from everest_ds.train.checkpoints.saving import order as orders
from everest_ds.train.checkpoints.saving.files import CheckpointFiles
from everest_ds.train.checkpoints.saving.saves import Saved, Saves
from everest_ds.train.checkpoints.saving.writer import NAME, Writer
from everest_ds.train.checkpoints.seal import find_damage

ALONE = World(rank=0, local_rank=0, size=1, local_size=1)
MODEL_STATES, SHARD = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"
KEEPING = Keeping(keep_last=2, keep_every_steps=None, best_step=None)
SLOW_S = 0.2


class SavingEngine:
    """Saves through its checkpoint engine, as DeepSpeed does; states are views of one flat tensor, as with ZeRO."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.module = torch.nn.Linear(2, 2)
        self.row = torch.arange(8.0)
        self.checkpoint_engine: Any = SimpleNamespace(save=torch.save)

    def zero_optimization_stage(self) -> int:
        return 2

    def save_checkpoint(self, folder: str, *, tag: str, save_latest: bool) -> None:
        (Path(folder) / tag).mkdir()
        parts = {"a": self.row[:6].view(2, 3), "b": self.row[6:], "none": torch.empty(0), "step": 3}
        for name in (MODEL_STATES, SHARD):
            self.checkpoint_engine.save(parts, f"{folder}/{tag}/{name}")


def state(step: int) -> TrainState:
    return TrainState(step=step, world_size=1, zero_stage=2, dtype="float32", videos="9 videos, abc")


def write_more(files: CheckpointFiles) -> None:
    files.add_tensors("more.safetensors", [("x", torch.ones(3))], {"decay": "0.5"})


@pytest.fixture
def seen() -> list[Saved]:
    return []


@contextlib.contextmanager
def saving(run_dir: Path, seen: list[Saved], *, behind: bool = True, owner: Owner | None = None) -> Iterator[Saves]:
    """Open the saves of a run of one rank; afterwards its writer process must have ended."""
    with contextlib.closing(Writer()) if behind else contextlib.nullcontext() as writer:
        yield Saves(
            engine=SavingEngine(), run_dir=run_dir, world=ALONE, on_saved=seen.append, writer=writer, owner=owner
        )
    assert not [child for child in psutil.Process().children() if child.name() == NAME]


def save(saves: Saves, step: int) -> None:
    saves.save(state(step), KEEPING, write_more=[write_more])


def files_of(run_dir: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


def slow_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Delay the next writer before each file."""
    write = orders._write

    def write_slowly(*given: Any) -> None:
        time.sleep(SLOW_S)
        write(*given)

    monkeypatch.setattr(orders, "_write", write_slowly)


def test_folder_is_the_one_that_a_save_at_a_standstill_makes(tmp_path: Path, seen: list[Saved]) -> None:
    for behind in (True, False):
        with saving(tmp_path / str(behind), seen, behind=behind) as saves:
            for step in (2, 4, 6):  # the first is pruned
                save(saves, step)
            saves.finish()
    assert files_of(tmp_path / "True") == files_of(tmp_path / "False")
    assert [(saved.step, saved.folder.name) for saved in seen[:3]] == [
        (2, "step-00000002"), (4, "step-00000004"), (6, "step-00000006"),
    ]  # fmt: skip
    assert find_damage(seen[2].folder, ALONE) is None


def test_steps_taken_meanwhile_change_no_file_and_a_save_waits_for_the_one_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seen: list[Saved]
) -> None:
    slow_down(monkeypatch)
    with saving(tmp_path, seen) as saves:
        save(saves, 2)
        saves.poll()
        assert not seen
        assert not list(tmp_path.glob("checkpoints/step-*"))
        saves.engine.row.fill_(-1)
        save(saves, 4)
        assert [saved.step for saved in seen] == [2]
        saves.engine.row.fill_(-2)
        saves.finish()
    rows = [torch.load(saved.folder / SHARD)["a"].flatten() for saved in seen]
    assert rows[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert rows[1].tolist() == [-1] * 6
    assert seen[0].stalled_s < SLOW_S < seen[0].took_s


def fail_in(where: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(orders, where, fail)


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "shard")
TORCH = RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0\nframe 1")


@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        ("_write", FULL, "No space left on device: 'shard'"),
        ("_write", TORCH, "RuntimeError: [enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0"),
        ("_write", MemoryError(), "MemoryError"),
        ("sync", OSError(errno.EIO, os.strerror(errno.EIO)), "Input/output error"),
        ("record_of", OSError(errno.EIO, os.strerror(errno.EIO)), "Input/output error"),
        ("write_seal", OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "Disk quota exceeded"),
        ("publish", OSError(errno.EACCES, os.strerror(errno.EACCES)), "Permission denied"),
    ],
)  # fmt: skip
def test_failure_of_the_writer_is_that_of_a_save_and_leaves_what_was(
    where: str, error: Exception, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seen: list[Saved]
) -> None:
    with saving(tmp_path, seen) as saves:
        save(saves, 2)
        saves.finish()
    before = files_of(tmp_path)
    fail_in(where, error, monkeypatch)
    with saving(tmp_path, seen) as saves:
        save(saves, 4)
        with pytest.raises(UserError) as raised:
            saves.finish()
    what = f"[Errno {error.errno}] {message}" if isinstance(error, OSError) else message
    folder, way_out = tmp_path / "checkpoints", "earlier ones are kept. Free space and start again"
    assert str(raised.value) == f"no checkpoint could be written to {folder}: {what}; {way_out}"
    assert files_of(tmp_path) == before
    assert [saved.step for saved in seen] == [2]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGQUIT])
@pytest.mark.parametrize("is_writing", [True, False])
def test_writer_that_dies_is_a_save_that_failed(
    number: signal.Signals, is_writing: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seen: list[Saved]
) -> None:
    slow_down(monkeypatch)
    with saving(tmp_path, seen) as saves:
        assert saves.writer is not None
        if is_writing:
            save(saves, 2)
        os.kill(saves.writer.pid, number)
        with pytest.raises(UserError, match=rf"the process that writes it \(pid \d+\) was ended by {number.name}"):
            saves.finish() if is_writing else _save_until_noticed(saves)
    assert not files_of(tmp_path)


def _save_until_noticed(saves: Saves) -> None:
    for step in range(2, 100):
        save(saves, step)
        time.sleep(0.1)


def test_signals_that_ask_a_rank_to_save_do_not_end_its_writer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seen: list[Saved]
) -> None:
    slow_down(monkeypatch)
    with saving(tmp_path, seen) as saves:
        assert saves.writer is not None
        save(saves, 2)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(saves.writer.pid, number)
        saves.finish()
    assert [saved.step for saved in seen] == [2]


def test_error_in_the_loop_lets_the_save_become_complete(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seen: list[Saved]
) -> None:
    slow_down(monkeypatch)
    with saving(tmp_path, seen) as saves:
        save(saves, 2)
        saves.settle()
    assert find_damage(seen[0].folder, ALONE) is None


def test_checkpoint_of_a_run_that_has_another_owner_by_now_gets_no_name(tmp_path: Path, seen: list[Saved]) -> None:
    me = Owner.of_this_process()
    with saving(tmp_path, seen, owner=me) as saves:
        (tmp_path / owners.OWNER).write_text(owners.json.dumps(owners.asdict(me) | {"pid": 1}))
        save(saves, 2)
        with pytest.raises(UserError, match=r"this launch has lost its run: .* is being trained by pid 1 on"):
            saves.finish()
    assert not list((tmp_path / "checkpoints").iterdir())


def test_machine_with_too_little_memory_for_copies_is_refused_before_it_is_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seen: list[Saved]
) -> None:
    engine = SavingEngine()
    engine.module = torch.nn.Linear(2**20, 16, bias=False)  # 64 MiB of weights, 192 MiB of states
    with contextlib.closing(Writer()) as writer:
        saves = Saves(engine=engine, run_dir=tmp_path, world=ALONE, on_saved=seen.append, writer=writer)
        monkeypatch.setattr(processes, "free_memory", lambda: 2**28)
        with pytest.raises(UserError, match=r"memory on .*: 0\.25 GiB, but 0\.25 are free\. Use --run\.no-save"):
            saves.reserve()
        monkeypatch.setattr(processes, "free_memory", lambda: 2**29)
        saves.reserve()
        assert saves._copies is not None
        assert 2**28 < saves._copies.num_bytes < 2**28 * 1.05
        save(saves, 2)
        saves.finish()
        assert saves._copies.num_bytes < 2**28 * 1.05  # no further memory was allocated
    assert find_damage(seen[0].folder, ALONE) is None


@pytest.mark.parametrize(("stage", "ranks"), [(0, [16, 0]), (2, [4 + 6, 6]), (3, [8, 8])])
def test_bytes_of_a_rank_are_its_part_of_weights_and_states(stage: int, ranks: list[int]) -> None:
    module = torch.nn.Linear(1, 1, bias=False)
    worlds = [World(rank=rank, local_rank=rank, size=2, local_size=2) for rank in range(2)]
    assert [bytes_of_rank(module, stage, world) for world in worlds] == ranks


def test_free_memory_is_part_of_the_machines() -> None:
    free = processes.free_memory()
    assert free is not None
    assert 0 < free <= psutil.virtual_memory().total
