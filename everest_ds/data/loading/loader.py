"""The loader: yields batches in order, prefetched by workers that may hang, crash or be killed without harm.

Place in the flow: requests (keys of samples) -> workers (`loading.pool`) -> pixels in shared memory
(`loading.shared_memory`) -> a batch. Random draws belong to keys, so batches do not depend on the number of
workers. A worker that hangs on a video is killed and replaced, and the video counts as unreadable. A worker that
crashes is replaced; a video that has crashed two workers counts as unreadable. The other requests of a lost worker
are queued again.
"""

import queue
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from everest_ds import pulse
from everest_ds.config.sections import DataConfig
from everest_ds.data.loading.pool import Mark, Outcome, Pool
from everest_ds.data.loading.shared_memory import Layout, Slots


class Sample(Protocol):
    """What a worker returns: a small object whose pixels travel separately, in shared memory."""

    @property
    def pixels(self) -> Tensor | None:
        """uint8; None if nothing could be read."""

    def with_pixels(self, pixels: Tensor | None) -> Self: ...


Key = TypeVar("Key")
Made = TypeVar("Made", bound=Sample)
Batch = TypeVar("Batch")


class SampleMaker(ABC, Generic[Key, Made]):
    """Interface for code that runs in workers: turns a request into samples. Each worker gets a copy.

    Attributes:
        config: How samples are loaded.
        sample_bytes: Largest number of bytes of a sample's pixels.
    """

    config: DataConfig
    sample_bytes: int

    @abstractmethod
    def __call__(self, request: Sequence[Key], unreadable: Mapping[int, str], mark: Mark) -> list[Made]:
        """Make a sample of each key of a request.

        Args:
            request: The keys. Which videos are opened, and in which order, depends on nothing else.
            unreadable: Videos not to open, by their number in that order (from 0), each with the reason.
            mark: Called with the number of a video before it is opened.
        """


# Requests queued in a worker, so that it never idles between two.
_DEPTH = 2
_MAX_DEATHS = 3
# Seconds between checks for `close`, and between rounds of collecting results while a batch waits to be taken.
_LOOK_AGAIN_S, _GLANCE_S = 0.1, 0.02


@dataclass(frozen=True, eq=False)
class Loader(Generic[Key, Made, Batch]):
    """Iterable over batches in order, for one pass; `iter` starts the workers.

    Attributes:
        maker: Makes the samples of requests.
        batches: The requests of each batch.
        assemble: Builds a batch from its samples, which are in order; must copy their pixels.
        batch_samples: Samples of the largest batch.
        request_samples: Samples of the largest request.
    """

    maker: SampleMaker[Key, Made]
    batches: Iterable[Sequence[Sequence[Key]]]
    assemble: Callable[[Sequence[Made]], Batch]
    batch_samples: int
    request_samples: int = 1

    def __iter__(self) -> "BatchIterator[Batch] | Generator[Batch]":
        """Return an iterator over the batches; close it when stopping early."""
        return BatchIterator(self) if self.maker.config.num_workers else self._make_here()

    def _make_here(self) -> Generator[Batch]:
        for requests in self.batches:
            yield self.assemble(
                [sample for keys in requests for sample in self.maker(keys, {}, lambda _: pulse.beat())]
            )


class BatchIterator(Generic[Batch]):
    """Iterator over the batches of a `Loader` with workers; a thread feeds the workers.

    The thread and the workers end with `close`, or when the iterator is garbage-collected.
    """

    def __init__(self, loader: Loader[Any, Any, Batch]) -> None:
        self._ended: BaseException | None = None
        self._feeder = _Feeder(loader)
        self._thread = threading.Thread(target=self._feeder.run, name="loader", daemon=True)
        self._thread.start()

    @property
    def pids(self) -> list[int]:
        return self._feeder.pool.pids

    @property
    def is_ready(self) -> bool:
        """Whether a batch is ready, so that `next` does not wait."""
        return not self._feeder.ready.empty()

    def __iter__(self) -> "BatchIterator[Batch]":
        return self

    def __next__(self) -> Batch:
        """Return the next batch, or raise the error of a worker."""
        if self._ended is not None:
            raise self._ended
        batch, error = self._feeder.ready.get()
        if error is None:
            return batch
        self._ended = error
        self.close()
        raise error

    def close(self) -> None:
        self._ended = self._ended or StopIteration()
        self._feeder.closing.set()
        self._thread.join()
        self._feeder.pool.close()

    def __del__(self) -> None:
        if hasattr(self, "_thread"):
            self.close()


@dataclass(eq=False)
class _Job(Generic[Key]):
    """A submitted request: a slot for each of its samples, its failures, and its samples once they are made."""

    request: Sequence[Key]
    slots: list[int]
    unreadable: dict[int, str] = field(default_factory=dict)
    deaths: int = 0
    samples: list[Any] | None = None


class _Feeder:
    """Passes requests to the workers, and puts finished batches into `ready`, in order."""

    def __init__(self, loader: Loader[Any, Any, Any]) -> None:
        config = loader.maker.config
        self.assemble = loader.assemble
        ahead = config.prefetch_batches * loader.batch_samples
        in_work = _DEPTH * config.num_workers * loader.request_samples
        self.slots = Slots(ahead + in_work, loader.maker.sample_bytes)
        self.free = list(range(self.slots.count))
        self.pool: Pool[Any, Any] = Pool(
            _MakeInSlots(loader.maker, self.slots),
            num_workers=config.num_workers,
            timeout_s=config.timeout_s,
            depth=_DEPTH,
        )
        self.ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(maxsize=1)
        self.closing = threading.Event()
        self.batches = iter(loader.batches)
        self.unsent: deque[Sequence[Any]] = deque()  # requests of the last batch that wait for free slots
        self.pending: deque[list[_Job[Any]]] = deque()  # batches, in order; the last one may still grow

    def run(self) -> None:
        """Make batches until there are none left, the iterator is closed, or something fails."""
        torch.set_num_threads(1)  # in this thread only: copying a batch must not occupy all cores
        end: BaseException = StopIteration()
        try:
            self._make_all()
        except BaseException as error:  # `BatchIterator.__next__` raises it
            end = error
        self._offer(None, end)

    def _make_all(self) -> None:
        while not self.closing.is_set():
            self._submit()
            if not self.pending:
                return
            jobs = self.pending[0]
            is_whole = not self.unsent or len(self.pending) > 1
            if is_whole and all(job.samples is not None for job in jobs):
                batch = self.assemble([sample for job in jobs for sample in job.samples or ()])
                self.pending.popleft()
                self.free += [slot for job in jobs for slot in job.slots]
                self._offer(batch)
            else:
                self._collect(_LOOK_AGAIN_S)

    def _submit(self) -> None:
        """Submit requests as long as there are slots for their samples."""
        while True:
            if not self.unsent:
                requests = next(self.batches, None)
                if requests is None:
                    return
                self.unsent.extend(requests)
                self.pending.append([])
            if len(self.unsent[0]) > len(self.free):
                return
            request = self.unsent.popleft()
            job = _Job(request, [self.free.pop() for _ in request])
            self.pending[-1].append(job)
            self.pool.submit(job)

    def _collect(self, timeout_s: float) -> None:
        for outcome in self.pool.wait(timeout_s):
            job = outcome.item
            if outcome.fault is not None:
                self._submit_again(job, outcome)
                continue
            job.samples = [
                sample if layout is None else sample.with_pixels(self.slots.view(slot, layout))
                for (sample, layout), slot in zip(outcome.result or (), job.slots, strict=True)
            ]

    def _submit_again(self, job: _Job[Any], outcome: Outcome[Any, Any]) -> None:
        """Submit a failed job again, without the video that hung or crashed a second worker."""
        job.deaths += not outcome.hung
        if outcome.mark is not None and (outcome.hung or job.deaths > 1):
            job.unreadable[outcome.mark] = outcome.fault or ""
            job.deaths = 0
        if job.deaths > _MAX_DEATHS:
            raise RuntimeError(f"processes that read videos end before they open one: {outcome.fault}")
        self.pool.submit(job, first=True)

    def _offer(self, batch: Any, error: BaseException | None = None) -> None:
        while not self.closing.is_set():
            try:
                self.ready.put((batch, error), timeout=_GLANCE_S)
            except queue.Full:
                if error is None:  # meanwhile keep the workers busy
                    self._submit()
                    self._collect(0)
            else:
                return


class _MakeInSlots:
    """Function of a worker: makes the samples of a job and writes their pixels to the job's slots."""

    def __init__(self, maker: SampleMaker[Any, Any], slots: Slots) -> None:
        self._maker, self._slots = maker, slots

    def __call__(self, job: _Job[Any], mark: Mark) -> list[tuple[Any, Layout | None]]:
        torch.set_num_threads(1)
        answer: list[tuple[Any, Layout | None]] = []
        for sample, slot in zip(self._maker(job.request, job.unreadable, mark), job.slots, strict=True):
            pixels = sample.pixels
            if pixels is None:
                answer.append((sample, None))
                continue
            layout = Layout.of(pixels)
            self._slots.view(slot, layout).copy_(pixels)
            answer.append((sample.with_pixels(None), layout))
        return answer
