"""The process of a rank that writes checkpoints while the rank trains.

Place in the flow: `Writer` forks it when a run starts, before there are connections or a CUDA context. The rank
sends it one `Order` per save. It answers when its files are on disk, and on rank zero again when the checkpoint is
published. It ends with its rank, however the rank ends. It ignores signals that ask a rank to save, because the
rank waits for it.

It is a process, not a thread, because torch.save holds Python's global lock while it writes a storage: another
thread was blocked for 79 ms while 240 MB were written, measured on a CPU.
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
# Added to the rank's own niceness, so that training has priority if CPU cores are scarce.
_NICENESS = 5


class SaveProgress(IntEnum):
    """The progress of a save; the largest value of all ranks counts."""

    DONE = 0
    WRITING = 1
    FAILED = 2


class Writer:
    """The rank's side; at most one order is in progress.

    Classes and functions in orders must have been imported when this object is made, because the process imports no
    modules later.
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
        """Check that the process still runs.

        Raises:
            OSError: It has ended.
        """
        if self._has_ended():
            raise OSError(self._describe_end())

    def begin(self, order: Order) -> None:
        """Send an order; the previous one must be done."""
        self._waits_for = ["written"] if order.publication is None else ["written", "published"]
        try:
            self._pipe.send(order)
        except OSError:
            self._lose()

    @property
    def progress(self) -> SaveProgress:
        """Return the progress of the last order, without waiting."""
        return self.wait(0.0)

    @property
    def has_written(self) -> bool:
        """Whether this rank's own files are on disk."""
        return "written" not in self._waits_for

    def wait(self, seconds: float) -> SaveProgress:
        """Wait at most ``seconds`` for the next answer; return the progress of the last order."""
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
        """End the process; files that it was writing stay unfinished."""
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
        """Record how the process has ended, after it has closed its end of the pipe."""
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
    """Provide the process that writes checkpoints in the background; None if training waits for them."""
    if not behind:
        yield None
        return
    pickle_stages_by_value()  # the writer must pickle as its rank does
    with contextlib.closing(Writer()) as writer:
        yield writer


def _serve(pipe: Connection, parent: int) -> NoReturn:
    """Carry out orders until the rank closes the pipe."""
    code = 1
    try:
        processes.end_with_parent()
        if os.getppid() == parent:  # else the rank ended before the kernel was asked to signal it
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
    signal.set_wakeup_fd(-1)  # so that this process's signals do not wake its rank
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    processes.name_this(NAME)
    stacks.keep_stacks_ready()
    os.nice(_NICENESS)
    torch.set_num_threads(1)
    gc.freeze()  # exclude the rank's objects from garbage collection


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
        except Exception as error:  # any error: the rank must know of it
            fault = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
        if fault is not None:
            pipe.send(("failed", fault))
