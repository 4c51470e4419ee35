"""The owner of a run directory: only one launch trains it at a time. Rank zero has its lock until it ends.

RUN/owner.lock   locked by the kernel (flock); has the owner's record, with a beat every few seconds; left empty

The kernel releases the lock when the process ends, however it ends. On a shared disk whose locks do not work across
nodes, the beat decides: the owner on another machine has ended if its beat no longer changes.
"""

import contextlib
import fcntl
import json
import os
import platform
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from everest_ds import distributed
from everest_ds.console.messages import say
from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.processes import started_at

OWNER = "owner.lock"
BEAT_EVERY_S = 10.0
# For another machine's owner. Network file systems show a change within a minute, or at once if a file is reopened.
GONE_AFTER_S = 60.0
_LOOK_EVERY_S = 1.0
# A record overwrites the previous one with the same size, so that it needs no space on a full disk.
_RECORD_BYTES = 512


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The process that trains a run.

    Attributes:
        pid: Its process number.
        host: Its machine's name.
        since: When it began to train, in local time.
        started: When the process began, in clock ticks of its machine.
        boot: Identifies its machine since the last boot.
        namespace: The namespace of its process number; containers have their own.
        beat: Counts its signs of life.
    """

    pid: int
    host: str
    since: str
    started: str
    boot: str
    namespace: str
    beat: int = 0

    @classmethod
    def of_this_process(cls) -> "Owner":
        """Return this process as an owner."""
        return cls(
            pid=os.getpid(),
            host=platform.node(),
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
            started=started_at(os.getpid()) or "",
            boot=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            namespace=os.readlink("/proc/self/ns/pid"),
        )

    def is_same(self, other: "Owner | None") -> bool:
        names = ("pid", "host", "started", "boot", "namespace")
        return other is not None and all(getattr(self, name) == getattr(other, name) for name in names)

    def is_neighbour(self, other: "Owner") -> bool:
        """Return whether both are on the same machine and in the same namespace of process numbers."""
        return (self.boot, self.namespace) == (other.boot, other.namespace)

    def runs_here(self) -> bool:
        """Return whether this process is on this machine and still runs."""
        return self.is_neighbour(Owner.of_this_process()) and started_at(self.pid) == self.started

    def refusal(self, run_dir: Path) -> str:
        """Return the message that refuses a second launch."""
        return (
            f"{run_dir} is being trained by pid {self.pid} on {self.host} since {self.since}; wait for it, stop it "
            f"(kill {self.pid} there: it saves), or name another folder with --out"
        )


def refuse_if_trained(run_dir: Path) -> None:
    """Refuse a run directory whose owner is another process that runs on this machine; needs no other rank.

    Raises:
        UserError: It is being trained.
    """
    with contextlib.suppress(OSError):
        owner = _parse((run_dir / OWNER).read_bytes())
        if owner is not None and owner.runs_here() and not owner.is_same(Owner.of_this_process()):
            raise UserError(owner.refusal(run_dir))


def find_owner(run_dir: Path) -> Owner | None:
    """Return who trains a run, as far as this machine can see: a process that runs, or elsewhere a fresh beat."""
    path = run_dir / OWNER
    with contextlib.suppress(OSError, RecursionError):
        owner = _parse(path.read_bytes())
        if owner is not None and owner.is_neighbour(Owner.of_this_process()):
            return owner if owner.runs_here() else None
        return owner if time.time() - path.stat().st_mtime < GONE_AFTER_S else None
    return None


@contextlib.contextmanager
def owning(run_dir: Path, world: World) -> Iterator["Holding"]:
    """Own a run directory inside this block; all ranks take part, and if one is refused, all are.

    A missing folder is made, and removed again if nothing was written to it.

    Raises:
        UserError: Another launch owns it, it cannot be written to, or the ranks name different directories.
    """
    lock, fault = None, None
    named = sorted(set(distributed.gather_objects(str(run_dir))))
    if len(named) > 1:
        raise UserError(
            f"the ranks of this launch differ in --out: {', '.join(named[:4])}; a launch trains one run. Start "
            "each run with its own command (srun -n 1)"
        )
    if world.is_main:
        try:
            lock = _Lock(run_dir)
        except UserError as error:
            fault = str(error)
        except OSError as error:
            fault = f"{error.filename or run_dir} cannot be written: {error.strerror}"
            fault += "; make the run directory writable, or name another folder with --out"
    try:
        if fault := distributed.agree(fault):
            raise UserError(fault)
        yield Holding(lock)
    finally:
        if lock is not None:
            lock.release()


class Holding:
    """A run directory that this launch owns; checks that it still does."""

    def __init__(self, lock: "_Lock | None") -> None:
        self._lock = lock

    def require(self) -> None:
        """Check that this launch still owns the directory; all ranks take part.

        Raises:
            UserError: It has another owner now, or was removed.
        """
        if fault := distributed.agree(find_loss(self._lock.run_dir, self._lock.owner) if self._lock else None):
            raise UserError(fault)

    @property
    def owner(self) -> Owner | None:
        """The owner, on rank zero; None on the others."""
        return None if self._lock is None else self._lock.owner


def find_loss(run_dir: Path, owner: Owner) -> str | None:
    """Return why a directory no longer belongs to an owner; None if it does."""
    now = _read(run_dir / OWNER)
    if owner.is_same(now):
        return None
    if now is not None:
        return f"this launch has lost its run: {now.refusal(run_dir)}"
    return f"{run_dir} was removed while it was being trained; start again, and keep the folder"


class _Lock:
    """The lock of a run directory, held by this process, and the thread that updates its beat."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self._path = run_dir, run_dir / OWNER
        self._made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
        self.owner = Owner.of_this_process()
        self._ended = threading.Event()
        self._file = -1
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._file, reaches = _open_locked(run_dir)
            before = _read(self._path)
            if before is not None and self._is_alive(before, reaches=reaches):
                raise UserError(before.refusal(run_dir))
            self._write(0)
        except BaseException:
            self._close()
            raise
        threading.Thread(target=self._beat, name="owner", daemon=True).start()

    def release(self) -> None:
        """Release the directory, and empty the record so that the next launch need not wait."""
        self._ended.set()
        if find_loss(self.run_dir, self.owner) is None:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, 0)
        self._close()

    def _is_alive(self, owner: Owner, *, reaches: bool) -> bool:
        """Return whether the recorded owner still trains, although its lock could be taken."""
        if owner.boot == self.owner.boot and reaches:
            return False  # same kernel: its lock would have been seen
        if owner.is_neighbour(self.owner):
            return owner.runs_here()
        say(f"{self._path} is of pid {owner.pid} on {owner.host}: checking for {GONE_AFTER_S:g} s whether it runs")
        until = time.monotonic() + GONE_AFTER_S
        while time.monotonic() < until:
            time.sleep(_LOOK_EVERY_S)
            now = _read(self._path)
            if now is None:
                return False
            if now != owner:
                return True
        return False

    def _write(self, beat: int) -> None:
        record = json.dumps(asdict(self.owner) | {"beat": beat}).encode()
        os.pwrite(self._file, record.ljust(_RECORD_BYTES - 1) + b"\n", 0)
        os.ftruncate(self._file, max(_RECORD_BYTES, len(record) + 1))
        os.fsync(self._file)

    def _beat(self) -> None:
        beat = 0
        while not self._ended.wait(BEAT_EVERY_S):
            beat += 1
            if find_loss(self.run_dir, self.owner) is None:
                with contextlib.suppress(OSError):  # the disk is temporarily unavailable
                    self._write(beat)

    def _close(self) -> None:
        """Close the file; remove it and the folders made for it if nothing else was written."""
        with contextlib.suppress(OSError):
            if self._file >= 0 and os.listdir(self.run_dir) == [OWNER] and not os.fstat(self._file).st_size:
                self._path.unlink()
        if self._file >= 0:
            os.close(self._file)
        with contextlib.suppress(OSError):  # not empty
            for folder in self._made:
                folder.rmdir()


def _read(path: Path) -> Owner | None:
    """Return the owner recorded at a path now, which may differ from that in an open file."""
    try:
        return _parse(path.read_bytes())
    except OSError:
        return None


def _open_locked(run_dir: Path) -> tuple[int, bool]:
    """Open and lock the file of a run; return it, and whether the file system supports locks.

    Raises:
        UserError: Another process has the lock, or the path is not a regular file.
        OSError: The file cannot be opened or made.
    """
    path = run_dir / OWNER
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if path.is_dir() or path.is_symlink():
                raise UserError(f"{path} is not a regular file, as a run makes it; remove it") from error
            raise
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise UserError(f"{path} is not a regular file, as a run makes it; remove it")
            reaches = _lock(file, run_dir)
            if _is_at(file, path):
                return file, reaches
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # its last owner has removed it: lock the new file


def _is_at(file: int, path: Path) -> bool:
    """Return whether a path still leads to an open file."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _lock(file: int, run_dir: Path) -> bool:
    """Lock a file; return False where the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = _parse(os.pread(file, 2 * _RECORD_BYTES, 0))
        text = "is being trained by another process; wait for it, or name another folder with --out"
        raise UserError(owner.refusal(run_dir) if owner else f"{run_dir} {text}") from error
    except OSError:
        return False
    return True


def _parse(record: bytes) -> Owner | None:
    """Return the owner in a record; None if it is empty or malformed."""
    try:
        return Owner(**json.loads(record))
    except (ValueError, TypeError):
        return None
