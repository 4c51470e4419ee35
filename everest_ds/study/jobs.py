"""Run the jobs of a study: `everest` commands in separate processes, a few at the same time.

A job is done if its run ended and was started by the same command; so an interrupted study can be resumed. Each job
writes its command and its log next to the run's folder: `KIND.command`, `KIND.log`.
"""

import os
import shlex
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from everest_ds.console.messages import say
from everest_ds.files import write_atomically
from everest_ds.interrupts import deferred
from everest_ds.progress import format_duration
from everest_ds.train.record.lines import read_measurements
from everest_ds.train.record.stored.evaluations import SUMMARY

JobKind = Literal["pretrain", "finetune", "probe"]

_POLL_S = 0.1
# Characters of the frame that the command line parser draws around its messages.
_FRAME = " ─│╭╮╰╯"
# Seconds of a run of each kind on one core, for the first estimates of the time left.
_GUESS_S = {"pretrain": 45.0, "finetune": 30.0, "probe": 15.0}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One `everest` command as words, and the job that must be done first.

    Command and log are written to ``folder``, the run's own files to ``folder / kind``.
    """

    kind: JobKind
    name: str
    words: tuple[str, ...]
    folder: Path
    needs: "Job | None" = None

    @property
    def out(self) -> Path:
        return self.folder / self.kind

    @property
    def log(self) -> Path:
        return self.folder / f"{self.kind}.log"

    @property
    def command(self) -> str:
        return shlex.join(("python", "-m", "everest_ds", *self.words))

    def is_complete(self) -> bool:
        if self.kind == "probe":
            return (self.out / SUMMARY).is_file()  # the last file that an evaluation writes
        return any(line.get("event") == "end" for line in read_metrics(self.out, "event"))

    def is_done(self) -> bool:
        """Return whether exactly this command has run to its end."""
        stamp = self.folder / f"{self.kind}.command"
        return stamp.is_file() and stamp.read_text() == f"{self.command}\n" and self.is_complete()


class Runner:
    """Runs jobs in order, a few at the same time, and prints progress.

    Args:
        jobs: Jobs, each after the job that it needs.
        slots: How many jobs run at the same time.
        num_gpus: GPUs to spread the jobs over; 0 runs them on the CPU with one thread each.
        on_done: Describes the result of a finished job in a few words.

    Attributes:
        failed: Jobs that failed, and those that were not run because they need one of these.
    """

    def __init__(self, *, jobs: Sequence[Job], slots: int, num_gpus: int, on_done: Callable[[Job], str]) -> None:
        self.failed: list[Job] = []
        self._jobs, self._slots, self._num_gpus, self._on_done = jobs, slots, num_gpus, on_done
        self._running: dict[int, tuple[Job, subprocess.Popen[bytes], TextIO, float]] = {}
        self._done: set[Job] = set()
        self._waiting: list[Job] = []
        self._took_s: defaultdict[str, list[float]] = defaultdict(list)

    def run(self) -> list[Job]:
        """Run all jobs that are not done; return `failed`.

        An interruption stops the runs, which save a checkpoint, and is raised to the caller.
        """
        self._done = {job for job in self._jobs if job.is_done()}
        self._waiting = [job for job in self._jobs if job not in self._done]
        if self._done:
            say(f"{len(self._done)} of {len(self._jobs)} runs are done already")
        try:
            while self._waiting or self._running:
                self._drop_hopeless()
                while len(self._running) < self._slots and (job := self._next()):
                    with deferred():  # an interrupt in between would leave a process that _stop does not know
                        self._start(job)
                self._collect()
                time.sleep(_POLL_S)
        finally:
            self._stop()
        return self.failed

    def _next(self) -> Job | None:
        ready = (job for job in self._waiting if job.needs is None or job.needs in self._done)
        if job := next(ready, None):
            self._waiting.remove(job)
        return job

    def _drop_hopeless(self) -> None:
        """Drop jobs that need a failed one."""
        for job in [job for job in self._waiting if job.needs in self.failed]:
            self._waiting.remove(job)
            self.failed.append(job)
            print(f"NOT RUN {job.kind} {job.name}: it needs a run that failed", flush=True)

    def _start(self, job: Job) -> None:
        job.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(job.folder / f"{job.kind}.command", f"{job.command}\n")
        slot = next(slot for slot in range(self._slots) if slot not in self._running)
        log = job.log.open("w", encoding="utf-8")
        process = subprocess.Popen(
            [sys.executable, "-m", "everest_ds", *job.words],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=self._environment(slot),
            start_new_session=True,  # Ctrl-C reaches only this process, which then sends SIGTERM to its runs
        )
        self._running[slot] = (job, process, log, time.perf_counter())

    def _environment(self, slot: int) -> dict[str, str]:
        launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        environment = {name: value for name, value in os.environ.items() if name not in launcher}
        environment["OMP_NUM_THREADS"] = "1"
        if not self._num_gpus:
            return environment | {"DS_ACCELERATOR": "cpu"}
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(gpu) for gpu in range(self._num_gpus)]
        return environment | {"CUDA_VISIBLE_DEVICES": gpus[slot % self._num_gpus]}

    def _collect(self) -> None:
        for slot, (job, process, log, began) in list(self._running.items()):
            code = process.poll()
            if code is None:
                continue
            del self._running[slot]
            log.close()
            if code or not job.is_complete():
                self.failed.append(job)
                why = f"exit code {code}: {_reason(job.log)}"
                print(f"FAILED {job.kind} {job.name} ({why}); see {job.log}", flush=True)
                continue
            self._done.add(job)
            took_s = time.perf_counter() - began
            self._took_s[job.kind].append(took_s)
            say(
                f"[{len(self._done)}/{len(self._jobs)}] {job.kind} {job.name}: {self._on_done(job)}, "
                f"{took_s:.0f} s; {format_duration(self._left_s())} left"
            )

    def _left_s(self) -> float:
        """Estimate the seconds left from the mean duration of earlier runs of each kind."""
        left = [*self._waiting, *(job for job, *_ in self._running.values())]
        return sum(statistics.fmean(self._took_s[job.kind] or [_GUESS_S[job.kind]]) for job in left) / self._slots

    def _stop(self) -> None:
        for _, process, _, _ in self._running.values():
            process.terminate()
        for _, process, log, _ in self._running.values():
            process.wait()
            log.close()


def read_metrics(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """Return the complete lines of one kind in RUN/metrics.jsonl; an empty list if there is no such file."""
    return [line for line in read_measurements(run_dir) if line["kind"] == kind]


def _reason(log: Path) -> str:
    """Return the last line of a log that contains "error", or else its last line."""
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line for line in (line.strip(_FRAME) for line in text.splitlines()) if line]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["it printed nothing"])[-1]
