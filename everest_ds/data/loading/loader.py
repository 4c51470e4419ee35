"""The loader: batches in their order, made ahead by processes that may hang, crash or be killed without harm.

Place in the flow: asks (which clips, or which row) -> processes (`loading.pool`) -> pixels in shared memory
(`loading.shared_memory`) -> a batch. Every draw belongs to a key, so batches do not depend on the number of
processes. A process that hangs on a video is killed, and the video is a bad one from then on, as if it could not be
read; one that ends without being asked to is replaced, and only a video that ends two is a bad one.
"""

import pickle
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from everest_ds.config.sections import DataConfig
from everest_ds.data.loading.pool import Mark, Outcome, Pool
from everest_ds.data.loading.shared_memory import Layout, Places


class Item(Protocol):
    """What processes make: something small, and pixels."""

    @property
    def pixels(self) -> Tensor | None:
        """uint8; None where nothing could be read."""

    def with_pixels(self, pixels: Tensor | None) -> Self:
        """Return it with other pixels."""


AskIn = TypeVar("AskIn", contravariant=True)
MadeOut = TypeVar("MadeOut", bound=Item, covariant=True)


class Maker(Protocol[AskIn, MadeOut]):
    """What is asked for clips. Each process gets a copy."""

    @property
    def config(self) -> DataConfig:
        """How clips are loaded."""

    @property
    def item_bytes(self) -> int:
        """Bytes of an item's pixels at most."""

    def num_items(self, ask: AskIn) -> int:
        """Return how many items come of an ask."""

    def __call__(self, ask: AskIn, faults: Mapping[int, str], mark: Mark) -> Sequence[MadeOut]:
        """Make the items of an ask.

        Videos are opened in an order that the ask alone decides. The number of each, from 0, is marked before it is
        opened; one that ``faults`` names by its number is not opened but counts as bad for that reason.
        """


Ask = TypeVar("Ask")
Made = TypeVar("Made", bound=Item)
Batch = TypeVar("Batch")

# Asks that a process has at a time, so that the next one lies ready when it has answered.
_DEPTH = 2
_MAX_DEATHS = 3
# Seconds until a closed stream notices, and until processes get more to do while a batch waits to be taken.
_LOOK_AGAIN_S, _GLANCE_S = 0.1, 0.02


class Loader(Generic[Ask, Made, Batch]):
    """Batches in order, one pass; processes begin with `iter`.

    Args:
        maker: Makes what is asked for.
        batches: What each batch asks for.
        assemble: Makes a batch of the items of its asks, in order; must copy their pixels.
        most_items: Items of the largest batch.
        most_of_an_ask: Items of the largest ask.
    """

    def __init__(
        self,
        maker: Maker[Ask, Made],
        batches: Iterable[Sequence[Ask]],
        assemble: Callable[[Sequence[Made]], Batch],
        *,
        most_items: int,
        most_of_an_ask: int = 1,
    ) -> None:
        self.maker, self.batches, self.assemble = maker, batches, assemble
        self.most_items, self.most_of_an_ask = most_items, most_of_an_ask

    def __iter__(self) -> "Stream[Batch] | Generator[Batch]":
        """Return the batches; close what is returned when done with it early."""
        if self.maker.config.num_workers:
            return Stream(self)
        return self._made_here()

    def _made_here(self) -> Generator[Batch]:
        for asks in self.batches:
            yield self.assemble([item for ask in asks for item in self.maker(ask, {}, _no_mark)])


@dataclass(eq=False)
class _Job(Generic[Ask]):
    """An ask on its way."""

    ask: Ask
    places: list[int]
    faults: dict[int, str] = field(default_factory=dict)
    deaths: int = 0
    items: list[Any] | None = None


class Stream(Generic[Batch]):
    """The batches of a `Loader`, as its processes make them; a thread looks after these.

    `close` ends thread and processes; so does losing the last reference to it.
    """

    def __init__(self, loader: Loader[Any, Any, Batch]) -> None:
        self._feeder = _Feeder(loader)
        self._thread = threading.Thread(target=self._feeder.run, name="loader", daemon=True)
        self._thread.start()
        self._ended: BaseException | None = None

    @property
    def pids(self) -> list[int]:
        """The processes."""
        return self._feeder.pool.pids

    @property
    def lies_ready(self) -> bool:
        """Whether `next` would not have to wait."""
        return not self._feeder.ready.empty()

    def __iter__(self) -> "Stream[Batch]":
        return self

    def __next__(self) -> Batch:
        """Return the next batch.

        Raises:
            UserError: A process met something that is the user's to mend.
            RuntimeError: A process met anything else, or processes do not stay alive.
            StopIteration: There is none left.
        """
        if self._ended is not None:
            raise self._ended
        batch, error = self._feeder.ready.get()
        if error is None:
            return batch
        self._ended = error
        self.close()
        raise error

    def close(self) -> None:
        """End thread and processes."""
        self._ended = self._ended or StopIteration()
        self._feeder.closing.set()
        self._thread.join()
        self._feeder.pool.close()

    def __del__(self) -> None:
        if hasattr(self, "_ended"):
            self.close()


class _Feeder:
    """Hands asks to the processes and batches to whoever waits for them, in order."""

    def __init__(self, loader: Loader[Any, Any, Any]) -> None:
        config = loader.maker.config
        self.loader = loader
        # What the next batches hold, and what processes have in hand meanwhile.
        ahead = config.prefetch_batches * loader.most_items
        in_hand = _DEPTH * config.num_workers * loader.most_of_an_ask
        self.places = Places(ahead + in_hand, loader.maker.item_bytes)
        self.free = list(range(self.places.count))
        self.pool: Pool[Any, Any] = Pool(
            _MakeInPlaces(loader.maker, self.places),
            processes=config.num_workers,
            timeout_s=config.timeout_s,
            depth=_DEPTH,
            begin=_use_one_thread,
        )
        self.ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(maxsize=1)
        self.closing = threading.Event()
        self.batches = iter(loader.batches)
        self.unasked: deque[Any] = deque()  # what the last batch asks for and no process was given yet
        self.pending: deque[list[_Job[Any]]] = deque()  # batches, in order; the last one may still grow
        self.has_more = True

    def run(self) -> None:
        """Make batches until there are none left, somebody closes the stream, or something fails."""
        torch.set_num_threads(1)  # of this thread: copying a batch must not take all cores
        try:
            self._make_all()
        except BaseException as error:  # the thread that waits for batches raises it
            self._offer((None, error))
        else:
            self._offer((None, StopIteration()))

    def _make_all(self) -> None:
        while not self.closing.is_set():
            self._submit()
            if not self.pending:
                return
            head = self.pending[0]
            is_whole = not self.unasked or len(self.pending) > 1
            if is_whole and all(job.items is not None for job in head):
                batch = self.loader.assemble([item for job in head for item in job.items or ()])
                self.pending.popleft()
                self.free += [place for job in head for place in job.places]
                self._offer((batch, None))
            else:
                self._look_after_pool()

    def _submit(self) -> None:
        """Hand out asks as long as there is room for what comes of them."""
        while True:
            if not self.unasked:
                asks = next(self.batches, None) if self.has_more else None
                if asks is None:
                    self.has_more = False
                    return
                self.unasked.extend(asks)
                self.pending.append([])
            num_items = self.loader.maker.num_items(self.unasked[0])
            if num_items > len(self.free):
                return
            job = _Job(self.unasked.popleft(), [self.free.pop() for _ in range(num_items)])
            self.pending[-1].append(job)
            self.pool.submit(job)

    def _look_after_pool(self, timeout_s: float = _LOOK_AGAIN_S) -> None:
        for outcome in self.pool.wait(timeout_s):
            job = outcome.item
            if outcome.fault is not None:
                self._try_again(job, outcome)
                continue
            job.items = [
                item if layout is None else item.with_pixels(self.places.view(place, layout))
                for (item, layout), place in zip(outcome.result or (), job.places, strict=True)
            ]

    def _try_again(self, job: _Job[Any], outcome: Outcome[Any, Any]) -> None:
        """Ask again, without the video that hung, or that a second process has ended at."""
        job.deaths += not outcome.hung
        if outcome.mark is not None and (outcome.hung or job.deaths > 1):
            job.faults[outcome.mark] = outcome.fault or ""
            job.deaths = 0
        if job.deaths > _MAX_DEATHS:
            raise RuntimeError(f"processes that read videos end before they open one: {outcome.fault}")
        self.pool.submit(job, first=True)

    def _offer(self, what: tuple[Any, BaseException | None]) -> None:
        while not self.closing.is_set():
            try:
                self.ready.put(what, timeout=_GLANCE_S)
            except queue.Full:
                if what[1] is None:  # keep the processes at work meanwhile
                    self._submit()
                    self._look_after_pool(0)
            else:
                return


class _MakeInPlaces:
    """What processes do: make the items of an ask, and write their pixels to their places."""

    def __init__(self, maker: Maker[Any, Any], places: Places) -> None:
        self._pickled = pickle.dumps(maker)  # once for all processes: it may hold a long list
        self._maker: Maker[Any, Any] | None = None
        self.places = places

    def __call__(self, job: _Job[Any], mark: Mark) -> list[tuple[Any, Layout | None]]:
        if self._maker is None:
            self._maker = pickle.loads(self._pickled)
        answer: list[tuple[Any, Layout | None]] = []
        for item, place in zip(self._maker(job.ask, job.faults, mark), job.places, strict=True):
            pixels = item.pixels
            if pixels is None:
                answer.append((item, None))
                continue
            layout = Layout.of(pixels)
            self.places.view(place, layout).copy_(pixels)
            answer.append((item.with_pixels(None), layout))
        return answer


def _use_one_thread() -> None:
    torch.set_num_threads(1)


def _no_mark(how_far: int) -> None:
    """Take no notice: nobody waits for this process."""
