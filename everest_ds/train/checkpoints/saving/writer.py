"""The process of a rank that writes checkpoints while the rank trains.

Place in the flow: `Writer` forks it when a run begins, before there are connections and a CUDA context. The rank
sends it one `Order` a save. It answers when its files are on disk, and on rank zero when the checkpoint has its
name. It ends with its rank, however that ends. It ignores signals that ask a rank to save: the rank waits for it.

It is a process and no thread because torch.save holds Python's lock while it writes a storage: another thread stood
still for 79 ms while 240 MB were written on a CPU here.
"""

import contextlib
import gc
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from enum import IntEnum
from multiprocessing import Pipe, reduction
from multiprocessing.connection import Connection
from typing import NoReturn

import torch

from everest_ds import processes, stacks
from everest_ds.train.checkpoints.save import pickle_stages_by_value
from everest_ds.train.checkpoints.saving.copies import Copies, Unpacker
from everest_ds.train.checkpoints.saving.order import Order
from everest_ds.train.signals import STOP_SIGNALS

NAME = "everest-writer"  # as ps and top show it
# Added to the rank's own: where processors are short, the training comes first.
_NICENESS = 5


class SaveProgress(IntEnum):
    """How far a save is; the largest of all ranks counts for all."""

    DONE = 0
    WRITING = 1
    FAILED = 2


class Writer:
    """The rank's side: at most one order is under way.

    Everything that orders hold must be importable when this object is made: modules are not imported later.
    """

    def __init__(self) -> None:
        self._pipe, theirs = Pipe()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        parent, before = os.getpid(), signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        self.pid = os.fork()
        if not self.pid:
            self._pipe.close()
            _serve(theirs, parent)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        self._waits_for: list[str] = []
        self._status: int | None = None
        self.fault: str | None = None
        """Why the last order failed."""

    def copies(self, device: torch.device) -> Copies:
        """Return memory for copies that this process reads."""
        return Copies(device, self._share)

    def require(self) -> None:
        """Look whether the process still runs.

        Raises:
            OSError: It has ended.
        """
        if self._has_ended():
            raise OSError(self._describe_end())

    def begin(self, order: Order) -> None:
        """Let an order be carried out; the one before is done."""
        self._waits_for = ["written"] if order.publication is None else ["written", "published"]
        try:
            self._pipe.send(order)
        except OSError:
            self._lose()

    @property
    def progress(self) -> SaveProgress:
        """How far the last order is, without waiting."""
        return self.wait(0.0)

    @property
    def has_written(self) -> bool:
        """Whether this rank's own files are on disk."""
        return "written" not in self._waits_for

    def wait(self, seconds: float) -> SaveProgress:
        """Wait for the next answer at most so long; return how far the last order is."""
        try:
            while self._waits_for and self.fault is None and self._pipe.poll(seconds):
                answer, fault = self._pipe.recv()
                self.fault = fault
                if fault is None:
                    self._waits_for.remove(answer)
                seconds = 0.0
        except (EOFError, OSError):
            self._lose()
        if self.fault is not None:
            return SaveProgress.FAILED
        return SaveProgress.WRITING if self._waits_for else SaveProgress.DONE

    def close(self) -> None:
        """End the process; what it was writing stays as it is."""
        if not self._has_ended():
            os.kill(self.pid, signal.SIGKILL)
            self._has_ended(0)
        self._pipe.close()

    def _share(self, file: int, num_bytes: int) -> None:
        try:
            self._pipe.send(num_bytes)
            reduction.send_handle(self._pipe, file, self.pid)
        except OSError as error:
            self._lose()
            raise OSError(self.fault) from error

    def _lose(self) -> None:
        """Note how the process has ended: it has closed its end of the pipe."""
        self._has_ended(0)
        self.fault = self._describe_end()

    def _has_ended(self, options: int = os.WNOHANG) -> bool:
        if self._status is None:
            pid, status = os.waitpid(self.pid, options)
            self._status = status if pid else None
        return self._status is not None

    def _describe_end(self) -> str:
        code = os.waitstatus_to_exitcode(self._status or 0)
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"the process that writes it (pid {self.pid}) {how}"


@contextlib.contextmanager
def writing(*, behind: bool) -> Iterator[Writer | None]:
    """Provide the process that writes checkpoints behind the training; None where the training waits for them."""
    if not behind:
        yield None
        return
    pickle_stages_by_value()  # the writer pickles as its rank does, and must know the classes that shards name
    with contextlib.closing(Writer()) as writer:
        yield writer


def _serve(pipe: Connection, parent: int) -> NoReturn:
    """Carry out orders until the rank has no more."""
    code = 1
    try:
        processes.end_with_parent()
        if os.getppid() == parent:  # else it ended before the kernel knew
            _become_writer()
            _answer_orders(pipe)
            code = 0
    except (EOFError, BrokenPipeError, ConnectionResetError):
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _become_writer() -> None:
    signal.set_wakeup_fd(-1)  # signals of this process are not its rank's
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    processes.name_this(NAME)
    stacks.keep_stacks_ready()
    os.nice(_NICENESS)
    torch.set_num_threads(1)
    gc.freeze()  # collections need not look at what the rank has made


def _answer_orders(pipe: Connection) -> None:
    unpacker = Unpacker()
    while True:
        order = pipe.recv()
        if isinstance(order, int):
            unpacker.add(reduction.recv_handle(pipe), order)
            continue
        fault = None
        try:
            order.write(unpacker)
            pipe.send(("written", None))
            if order.publication is not None:
                order.publish()
                pipe.send(("published", None))
        except BrokenPipeError:
            raise
        except OSError as error:
            fault = str(error)
        except Exception as error:  # whatever it is, the rank must know
            fault = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
        if fault is not None:
            pipe.send(("failed", fault))
