from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.train.checkpoints import owner
from everest_ds.train.checkpoints.owner import OWNER, Owner, owning, refuse_if_trained

ALONE = World(rank=0, local_rank=0, size=1, local_size=1)
HOLD = """
import sys, time
from pathlib import Path
from everest_ds.distributed import World
from everest_ds.train.checkpoints.owner import owning
with owning(Path(sys.argv[1]), World(rank=0, local_rank=0, size=1, local_size=1)):
    print("owned", flush=True)
    time.sleep(60)
"""


@contextmanager
def owned_by_another(run_dir: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a process that owns a run directory."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(run_dir)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "owned\n"
        try:
            yield process
        finally:
            process.kill()


def take(run_dir: Path) -> None:
    with owning(run_dir, ALONE):
        pass


def test_owner_is_named_until_it_ends_by_whatever_and_the_next_one_need_not_wait(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with owned_by_another(run_dir) as process:
        same = tmp_path / "by another name"
        same.symlink_to(run_dir)
        for path in (run_dir, same):
            for refuse in (take, refuse_if_trained):
                with pytest.raises(UserError, match=f"is being trained by pid {process.pid} on .* since 2.*--out"):
                    refuse(path)
        process.kill()
        process.wait()
        refuse_if_trained(run_dir)
        take(run_dir)


def test_lock_stays_where_something_was_written_and_else_nothing_does(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "new"
    for _ in range(2):
        take(run_dir)
        assert list(tmp_path.iterdir()) == []
    with owning(run_dir, ALONE):
        (run_dir / "config.json").touch()
    assert (run_dir / OWNER).read_bytes() == b""
    with pytest.raises(UserError, match="refused for another reason"), owning(run_dir, ALONE):
        raise UserError("refused for another reason")
    assert (run_dir / OWNER).read_bytes() == b""


def test_of_many_that_come_and_go_only_one_owns_at_a_time(tmp_path: Path) -> None:
    """Every owner removes the folder at its end, while others open the lock in it."""
    inside, most, turns = [0], [0], [0]

    def come_and_go() -> None:
        until = time.monotonic() + 1
        while time.monotonic() < until:
            try:
                with owning(tmp_path / "run", ALONE):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    time.sleep(0.001)
                    inside[0] -= 1
                    turns[0] += 1
            except UserError:
                continue

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert turns[0] > 20


def of_elsewhere(**changed: object) -> Owner:
    return replace(Owner.of_this_process(), **{"boot": "of another machine", "host": "node7", "pid": 17, **changed})


def write(run_dir: Path, record: Owner) -> None:
    run_dir.mkdir(exist_ok=True)
    (run_dir / OWNER).write_text(json.dumps(asdict(record)).ljust(511) + "\n")


def test_owner_on_another_machine_counts_while_its_beat_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "GONE_AFTER_S", 0.6)
    monkeypatch.setattr(owner, "_LOOK_EVERY_S", 0.05)
    write(tmp_path, of_elsewhere())
    beat = threading.Timer(0.2, write, (tmp_path, of_elsewhere(beat=1)))
    beat.start()
    with pytest.raises(UserError, match="is being trained by pid 17 on node7"):
        take(tmp_path)
    beat.join()
    began = time.monotonic()
    with owning(tmp_path, ALONE):  # the heartbeat has stopped
        assert time.monotonic() - began > 0.5
        assert json.loads((tmp_path / OWNER).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_where_locks_are_unknown_the_process_itself_is_looked_for(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", unknown)
    with owned_by_another(tmp_path) as process:
        with pytest.raises(UserError, match=f"pid {process.pid} on"):
            take(tmp_path)
        process.kill()
        process.wait()
        take(tmp_path)
    write(tmp_path, replace(Owner.of_this_process(), started="1"))  # a process id that was reused
    take(tmp_path)


def test_beat_is_written_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "BEAT_EVERY_S", 0.01)
    with owning(tmp_path, ALONE):
        node = (tmp_path / OWNER).stat().st_ino
        until = time.monotonic() + 10
        while json.loads((tmp_path / OWNER).read_text())["beat"] < 3:
            assert time.monotonic() < until
            time.sleep(0.01)
        assert (tmp_path / OWNER).stat().st_ino == node
        assert (tmp_path / OWNER).stat().st_size == 512


def test_run_that_was_taken_over_or_removed_is_not_written_to_any_more(tmp_path: Path) -> None:
    with owning(tmp_path, ALONE) as holding:
        holding.require()
        write(tmp_path, of_elsewhere())
        with pytest.raises(UserError, match=r"has lost its run: .* is being trained by pid 17 on node7"):
            holding.require()
    assert Owner(**json.loads((tmp_path / OWNER).read_text())).pid == 17  # the new owner's record stays
    (tmp_path / OWNER).unlink()
    with owning(tmp_path, ALONE) as holding:
        (tmp_path / OWNER).unlink()
        with pytest.raises(UserError, match="was removed while it was being trained"):
            holding.require()


def a_folder(path: Path) -> None:
    path.mkdir()


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_link_to_nothing(path: Path) -> None:
    path.symlink_to("nothing")


@pytest.mark.parametrize("make", [a_folder, a_pipe, a_link_to_nothing])
def test_something_else_of_the_locks_name_is_refused(make: object, tmp_path: Path) -> None:
    assert callable(make)
    make(tmp_path / OWNER)
    with pytest.raises(UserError, match=r"owner\.lock is not a regular file.*remove it"):
        take(tmp_path)


@pytest.mark.parametrize("left", [b"", b"{", b"\xff\xfe", b"[]", b'{"pid": 1}', b"\0" * 512])
def test_record_that_was_cut_short_is_nobodys(left: bytes, tmp_path: Path) -> None:
    (tmp_path / OWNER).write_bytes(left)
    refuse_if_trained(tmp_path)
    with owning(tmp_path, ALONE):
        assert json.loads((tmp_path / OWNER).read_text())["pid"] == os.getpid()


def test_directory_that_cannot_be_written_is_refused_and_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file.* cannot be written: .*name another folder with --out"):
        take(tmp_path / "file" / "run")

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match="run cannot be written: No space left on device"):
        take(tmp_path / "run")
    assert not (tmp_path / "run").exists()
