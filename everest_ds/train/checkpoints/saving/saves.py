"""Saves checkpoints of a run while the loop waits, or in the background by a writer process of every rank.

Place in the flow: the loop -> `Saves.save` on the step of a checkpoint -> `Saves.poll` at every step boundary ->
`Saves.finish` at the end, or `Saves.settle` if the loop ends by an error.

A save in the background is the same transaction. Every rank copies its content, and its writer writes the copy into
a folder tmp-*. Rank zero's writer waits until all ranks' files are flushed. Then it seals and renames the folder.
Ranks agree on the progress of a save only at step boundaries, by one number each; writers do not communicate. At
most one save is in progress. If a writer fails or dies, the run ends as after any failed save.
"""

import contextlib
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from everest_ds import distributed, processes, pulse
from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.train.checkpoints.listing import folder_of
from everest_ds.train.checkpoints.owner import Owner
from everest_ds.train.checkpoints.save import (
    Keeping,
    TrainState,
    all_must,
    bytes_of_rank,
    checkpoint_bytes,
    describing_files,
    folders_of_save,
    keep_within,
    make_room,
    remove_leftovers,
    run_deepspeed,
    save_checkpoint,
    unwritten,
)
from everest_ds.train.checkpoints.saving.files import CheckpointFiles, FilesInFolder
from everest_ds.train.checkpoints.saving.order import Order, OrderedFiles, Publication
from everest_ds.train.checkpoints.saving.writer import SaveProgress, Writer

# After an error, rank zero waits this long for the other ranks' files once its own are written. They write less
# than it does, and a killed rank writes nothing more, so the wait is short.
_OTHERS_MAY_TAKE_S = 3.0
_LOOK_EVERY_S = 0.1


WriteMore = Callable[[CheckpointFiles], None]


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint that is complete.

    Attributes:
        step: Its step.
        folder: Its folder.
        took_s: Seconds from the start of the save until rank zero knew that it was complete.
        stalled_s: Seconds of these in which the loop waited.
    """

    step: int
    folder: Path
    took_s: float
    stalled_s: float


@dataclass(kw_only=True)
class _UnderWay:
    step: int
    folder: Path
    began: float
    stalled_s: float


@dataclass(kw_only=True)
class Saves:
    """Writes the checkpoints of a run; all ranks call the same methods at the same steps.

    Attributes:
        engine: The DeepSpeed engine.
        run_dir: The run directory.
        world: This rank and the number of ranks.
        on_saved: Called for every complete checkpoint.
        writer: Writes in the background; None if the loop waits for every save.
        owner: The process that must own the run when a background save is published; None to skip that check.
    """

    engine: Any
    run_dir: Path
    world: World
    on_saved: Callable[[Saved], None]
    writer: Writer | None = None
    owner: Owner | None = None
    _under_way: _UnderWay | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        """Prepare for copies; their memory is allocated by `reserve` or by the first save."""
        self._copies = None if self.writer is None else self.writer.copies(torch.device(self.engine.device))

    def reserve(self, extra_bytes: int = 0) -> None:
        """Allocate the memory for copies before the first step, because it is slow; all ranks take part.

        Raises:
            UserError: A machine has too little memory.
        """
        if self._copies is None:
            return
        stage = self.engine.zero_optimization_stage()
        needed = bytes_of_rank(self.engine.module, stage, self.world) + (extra_bytes if self.world.is_main else 0)
        needed += needed // 50  # rows are padded, and copies aligned
        host, free, fault = platform.node(), processes.free_memory(), None
        here = sum(num for name, num in distributed.gather_objects((host, needed)) if name == host)
        if free is not None and here > free:
            fault = f"{here / 2**30:.2f} GiB, but {free / 2**30:.2f} are free"
        else:
            try:
                self._copies.reserve(needed)
            except OSError as error:
                fault = f"{here / 2**30:.2f} GiB: {error}"
        if fault := distributed.agree(fault):
            raise UserError(
                f"copies of checkpoints need host memory on {host}: {fault}. Use --run.no-save-async, so that "
                "training waits for every save instead, or start fewer processes per machine"
            )

    def save(
        self,
        state: TrainState,
        keeping: Keeping,
        *,
        extra_bytes: int = 0,
        write_more: Sequence[WriteMore] = (),
    ) -> None:
        """Save the state of the run, after any save that is still in progress; see `save_checkpoint`.

        Raises:
            UserError: The disk is full or cannot be written to, in this save or the previous one.
        """
        began = time.perf_counter()
        self.finish()
        if self.writer is None:
            folder = self._save_here(state, keeping, extra_bytes, write_more)
            took_s = time.perf_counter() - began
            self.on_saved(Saved(step=state.step, folder=folder, took_s=took_s, stalled_s=took_s))
            return
        temporary, final = folders_of_save(self.run_dir, state.step)
        needed = checkpoint_bytes(self.engine.module) + extra_bytes
        make_room(self.run_dir, temporary, needed, self.world, require=self.writer.require)
        files = self._collect(state, temporary, write_more)
        publication = Publication(
            run_dir=self.run_dir, final=final, world_size=self.world.size, owner=self.owner, keeping=keeping
        )
        order = Order(
            folder=temporary,
            rank=self.world.rank,
            files=tuple(files.files),
            publication=publication if self.world.is_main else None,
        )
        self.writer.begin(order)
        stalled_s = time.perf_counter() - began
        self._under_way = _UnderWay(step=state.step, folder=final, began=began, stalled_s=stalled_s)

    def poll(self) -> None:
        """Check whether the save in progress is complete, by exchanging one number; does nothing without a save.

        Raises:
            UserError: The save has failed on any rank.
        """
        if self._under_way is None or self.writer is None:
            return
        progress = distributed.largest(self.writer.progress)
        if progress == SaveProgress.FAILED:
            self._fail(self.writer)
        elif progress == SaveProgress.DONE:
            self._note(self._under_way)

    def finish(self) -> None:
        """Wait until no save is in progress; see `poll`."""
        if self._under_way is not None:
            pulse.enter("saving")
        while self._under_way is not None and self.writer is not None:
            self.writer.wait(_LOOK_EVERY_S)
            self.poll()

    def settle(self) -> None:
        """Give a save in progress time to complete after an error, without communicating with other ranks."""
        if self._under_way is None or self.writer is None:
            return
        pulse.enter("saving")
        until = None
        while self.writer.wait(_LOOK_EVERY_S) == SaveProgress.WRITING:
            if until is None and self.writer.has_written:
                until = time.monotonic() + _OTHERS_MAY_TAKE_S
            if until is not None and time.monotonic() > until:
                return
        if self.writer.fault is None:
            self._note(self._under_way)

    def _save_here(
        self, state: TrainState, keeping: Keeping, extra_bytes: int, write_more: Sequence[WriteMore]
    ) -> Path:
        """Save while all ranks wait."""

        def write_all(folder: Path) -> None:
            for write in write_more:
                write(FilesInFolder(folder))

        folder = save_checkpoint(
            self.engine, self.run_dir, state, self.world, extra_bytes=extra_bytes, write_more=[write_all]
        )
        if self.world.is_main:
            keep_within(self.run_dir, keeping)
        return folder

    def _collect(self, state: TrainState, temporary: Path, write_more: Sequence[WriteMore]) -> OrderedFiles:
        assert self._copies is not None
        self._copies.clear()
        files = OrderedFiles(self._copies)
        with _collecting(self.engine, files):
            run_deepspeed(self.engine, temporary)
        if write_more:
            all_must(self.world, temporary.parent, lambda: [write(files) for write in write_more])
        if self.world.is_main:
            for name, content in describing_files(state, self.run_dir):
                files.add_bytes(name, content)
        self._copies.wait()
        return files

    def _note(self, saved: _UnderWay) -> None:
        self._under_way = None
        took_s = time.perf_counter() - saved.began
        self.on_saved(Saved(step=saved.step, folder=saved.folder, took_s=took_s, stalled_s=saved.stalled_s))

    def _fail(self, writer: Writer) -> None:
        """End a save that failed on any rank, on all of them."""
        self._under_way = None
        fault = writer.fault
        writer.close()  # so that no rank writes after all have agreed
        fault = distributed.agree(fault)
        folder = folder_of(self.run_dir)
        if self.world.is_main:
            remove_leftovers(folder)
        raise UserError(unwritten(folder, fault or "a writer failed"))


@contextlib.contextmanager
def _collecting(engine: Any, files: OrderedFiles) -> Iterator[None]:
    """Inside this block, collect the files that DeepSpeed would write."""
    before = engine.checkpoint_engine
    engine.checkpoint_engine = _Collector(before, files)
    try:
        yield
    finally:
        engine.checkpoint_engine = before


class _Collector:
    """Replaces DeepSpeed's checkpoint engine: collects files instead of saving them."""

    def __init__(self, engine: Any, files: OrderedFiles) -> None:
        self._engine, self._files = engine, files

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def save(self, state_dict: Any, path: str) -> None:
        self._files.add_shard(Path(path).name, state_dict)
