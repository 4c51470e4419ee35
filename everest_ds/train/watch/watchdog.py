"""The watchdog: ends a hanging run, writes the stacks of all ranks, and names the rank that blocks it.

RUN/hangs/TIME/rank-00001.json   the sign of a rank: what it is doing, every few seconds while the run trains
               rank-00001.txt    its stacks and those of its processes at the hang
               nccl-00001.json   its last collectives, by torch's flight recorder
               report.txt        which rank blocks the run, and what each rank was doing

Each rank has two threads that do not depend on the main thread: one writes the rank's sign, the other checks for
progress. Ranks communicate through files, because collectives hang. A folder without a report is removed.
"""

import contextlib
import faulthandler
import json
import os
import shutil
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from torch import Tensor

from everest_ds import distributed, interrupts, pulse, stacks
from everest_ds.distributed import World
from everest_ds.errors import escaped
from everest_ds.files import append_json_lines, parse_json
from everest_ds.stacks import EXIT_HUNG, HANG_SIGNAL
from everest_ds.train.callbacks import Callback
from everest_ds.train.checkpoints.owner import Owner
from everest_ds.train.record.lines import METRICS
from everest_ds.train.step.updater import StepResult
from everest_ds.train.watch.flight_recorder import num_queued, recorded
from everest_ds.train.watch.verdict import Sign, Verdict, judge

HANGS = "hangs"
MEDIANS = 5
"""A run hangs after no progress for this many median steps, or for the setting if that is longer."""
PATIENCE = 10
"""The limit is this many times longer in the first steps of a launch, and while the run is scored or saved."""
PATIENT_PHASES = ("saving", "scoring")
_FIRST_STEPS, _STEPS_OF_MEDIAN = 3, 101
_BEAT_S = 5.0
_REPORT, _FOUND = "report.txt", "found"


class Watchdog(Callback):
    """Ends this process with `EXIT_HUNG` when the run hangs; every rank has one.

    Args:
        run_dir: The run directory.
        world: This rank and the number of ranks.
        hang_after_s: Seconds without progress that count as a hang; 0 turns the watchdog off.
        loader_s: Seconds that the loader may need to replace a process that hangs on a video, added to the limit.
    """

    def __init__(self, run_dir: Path, world: World, *, hang_after_s: float, loader_s: float) -> None:
        self._run_dir, self._world = run_dir, world
        self._hang_after_s, self._loader_s = hang_after_s, loader_s
        self._beat_s = min(_BEAT_S, hang_after_s / 4)
        self._durations: deque[float] = deque(maxlen=_STEPS_OF_MEDIAN)
        self._num_steps, self._step, self._stepped_at = 0, 0, 0.0
        self._me = Owner.of_this_process()
        self._num_beats = 0
        self._ended, self._is_ending = threading.Event(), threading.Event()
        self._folder: Path | None = None
        self._stacks: TextIO | None = None

    def on_step(self, step: int, losses: Sequence[Tensor], result: StepResult) -> None:
        """Record the step's duration; after the second step, set the timeout of collectives by the limit."""
        now = time.monotonic()
        if self._num_steps:
            self._durations.append(now - self._stepped_at)
        self._num_steps, self._step, self._stepped_at = self._num_steps + 1, step, now
        if self._num_steps == 2 and self._hang_after_s:
            distributed.set_timeout(1.5 * PATIENCE * self._patience_s() + self._loader_s)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the run inside this block; all ranks take part."""
        if not self._hang_after_s:
            yield
            return
        self._open()
        try:
            yield
        except BaseException:
            if self._is_found():  # the error occurred because a peer has ended
                self._end()
            raise
        finally:
            self._close()

    def limit_s(self) -> float:
        """Return the seconds without progress that count as a hang in the current phase."""
        is_patient = self._num_steps < _FIRST_STEPS or pulse.PULSE.phase in PATIENT_PHASES
        return (PATIENCE if is_patient else 1) * self._patience_s() + self._loader_s

    def _patience_s(self) -> float:
        return max(self._hang_after_s, MEDIANS * statistics.median(self._durations or [0.0]))

    def _open(self) -> None:
        hangs = self._run_dir / HANGS
        began = distributed.gather_objects(time.strftime("%Y%m%d-%H%M%S"))[0]
        self._folder = hangs / began
        with contextlib.suppress(OSError):
            if self._world.is_main and hangs.is_dir():
                for folder in [path for path in hangs.iterdir() if path.is_dir() and path != self._folder]:
                    if not any((folder / name).exists() for name in (_REPORT, _FOUND)):
                        shutil.rmtree(folder, ignore_errors=True)
            self._folder.mkdir(parents=True, exist_ok=True)
            self._stacks = self._path("txt").open("a", encoding="utf-8")
            stacks.end_with_stacks(self._stacks)
        self._say()
        distributed.barrier()  # from here on every rank has written a sign
        pulse.beat()
        for name, work in (("beats", self._keep_saying), ("watchdog", self._watch)):
            threading.Thread(target=work, name=name, daemon=True).start()

    def _close(self) -> None:
        """Stop watching, and remove the files unless a hang was found."""
        self._ended.set()
        if self._stacks is None or self._folder is None:
            return
        stacks.forget()
        self._stacks.close()
        with contextlib.suppress(OSError):
            if not self._is_found():
                self._path("txt").unlink()
                self._path("json").unlink()
                self._folder.rmdir()  # succeeds only on the last rank, when it is empty
                self._folder.parent.rmdir()

    def _path(self, suffix: str, *, kind: str = "rank", rank: int | None = None) -> Path:
        assert self._folder is not None
        return self._folder / f"{kind}-{self._world.rank if rank is None else rank:05d}.{suffix}"

    def _say(self, *, is_hung: bool = False) -> None:
        self._num_beats += 1
        call, waits = stacks.describe_call()
        sign = Sign(
            rank=self._world.rank,
            process=self._me,
            beat=self._num_beats,
            step=self._step,
            position=pulse.PULSE.position,
            phase=pulse.PULSE.phase,
            idle_s=round(time.monotonic() - pulse.PULSE.at, 1),
            limit_s=round(self.limit_s(), 1),
            call=call,
            waits=waits,
            queued=num_queued() if is_hung else None,
            is_hung=is_hung,
        )
        path = self._path("json")
        with contextlib.suppress(OSError):  # the disk is full, or temporarily unavailable
            path.with_suffix(".tmp").write_text(json.dumps(asdict(sign)))
            path.with_suffix(".tmp").replace(path)

    def _read(self) -> dict[int, Sign]:
        """Return the last sign of every rank that has written one."""
        signs = {}
        for rank in range(self._world.size):
            with contextlib.suppress(OSError, ValueError, TypeError):
                raw = parse_json(self._path("json", rank=rank).read_text())
                signs[rank] = Sign(**raw | {"process": Owner(**raw["process"])})
        return signs

    def _keep_saying(self) -> None:
        while not self._ended.wait(self._beat_s) and not self._is_ending.is_set():
            self._say()

    def _watch(self) -> None:
        while True:
            began = time.monotonic()
            if self._ended.wait(self._beat_s / 2):
                return
            if time.monotonic() - began > 2 * self._beat_s + 1:
                pulse.beat()  # the process itself was suspended
            if self._is_found() or (self._is_late() and self._all_are_late()):
                self._end()

    def _is_late(self) -> bool:
        return time.monotonic() - pulse.PULSE.at > self.limit_s()

    def _is_found(self) -> bool:
        return self._folder is not None and (self._folder / _FOUND).exists()

    def _all_are_late(self) -> bool:
        """Return whether no rank makes progress, by reading all signs twice."""
        before = self._read()
        time.sleep(2.5 * self._beat_s)
        after = self._read()
        gets_further = [
            sign for sign in after.values() if sign.idle_s <= sign.limit_s and sign != before.get(sign.rank)
        ]
        return self._is_late() and not gets_further

    def _end(self) -> None:
        """Write stacks and a report, and end this process even if the disk hangs."""
        if self._is_ending.is_set():
            threading.Event().wait()  # another thread ends the process
        self._is_ending.set()
        work = threading.Thread(target=self._leave_report, name="report", daemon=True)
        work.start()
        work.join(8 * self._beat_s + 10)
        os._exit(EXIT_HUNG)

    def _leave_report(self) -> None:
        assert self._folder is not None
        with contextlib.suppress(OSError):
            (self._folder / _FOUND).touch()
        self._say(is_hung=True)
        before = self._read()
        with contextlib.suppress(OSError), self._path("txt").open("a", encoding="utf-8") as file:
            faulthandler.dump_traceback(file=file, all_threads=True)
            file.write(stacks.of_children(os.getpid()))
        with contextlib.suppress(OSError):
            if trace := recorded():
                self._path("json", kind="nccl").write_bytes(trace)
        silent = self._wait_for_peers(before)
        signs = self._read()
        verdict = judge(list(signs.values()), silent)
        with contextlib.suppress(FileExistsError):
            self._write_report(signs, silent, verdict)
        for rank in silent:
            _wake(signs.get(rank))

    def _wait_for_peers(self, before: dict[int, Sign]) -> set[int]:
        """Wait until every rank has detected the hang too; return those that have not and give no more signs."""
        until = time.monotonic() + 4 * self._beat_s + 1
        while True:
            signs = self._read()
            missing = {rank for rank in range(self._world.size) if rank not in signs or not signs[rank].is_hung}
            if not missing or time.monotonic() > until:
                return {rank for rank in missing if before.get(rank) == signs.get(rank)}
            time.sleep(self._beat_s / 5)

    def _write_report(self, signs: dict[int, Sign], silent: set[int], verdict: Verdict) -> None:
        """Write and print the report, unless a peer has done so; the record gets an event.

        Raises:
            FileExistsError: A peer has written it.
        """
        assert self._folder is not None
        lines = [sign.describe() for sign in signs.values()]
        for rank in silent:
            known = signs.get(rank)
            is_here = known is not None and known.process.is_neighbour(self._me)
            state = f", {stacks.state_of(known.process.pid)}" if known is not None and is_here else ""
            lines.append(f"rank {rank} gives no sign of life{state}")
        named = f"rank {', '.join(map(str, verdict.ranks))}: " if verdict.ranks else ""
        idle_s = max((sign.idle_s for sign in signs.values()), default=0.0)
        head = f"the run hangs after step {self._step}: no progress for {idle_s:.0f} s; {named}{verdict.why}"
        text = "\n".join(map(escaped, [head, *lines]))
        try:
            with (self._folder / _REPORT).open("x", encoding="utf-8") as file:
                file.write(text + "\n")
            event = {"kind": "event", "step": self._step, "time_s": round(time.time(), 3), "event": "hang"}
            append_json_lines(self._run_dir / METRICS, [event | {"ranks": verdict.ranks, "why": verdict.why}])
        except FileExistsError:
            raise
        except OSError:  # perhaps the disk hangs
            pass
        stay = f"stacks are in {self._folder}; the same command resumes the run (exit code {EXIT_HUNG})"
        interrupts.write_past_buffers(f"everest: {text}\n{escaped(stay)}\n")


def _wake(sign: Sign | None) -> None:
    """Make a stopped rank on this machine write its stacks and end; see `everest_ds.stacks`."""
    if sign is not None and sign.process.runs_here():
        with contextlib.suppress(OSError):
            os.kill(sign.process.pid, HANG_SIGNAL)
            os.kill(sign.process.pid, signal.SIGCONT)
